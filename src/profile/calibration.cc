// Calibration text: the project's own prompts continued by the model itself, or a file.
#include <algorithm>
#include <array>
#include <cmath>

#include "base/checksum.h"
#include "base/file.h"
#include "kvmix/error.h"
#include "kvmix/measure.h"
#include "profile/json_lines.h"

namespace kvmix {
namespace {

// Several kinds of text, since what matters in a cache differs between them.
constexpr std::array<const char*, 16> kPrompts = {
    "The lighthouse had been empty for eleven years when Mara was sent to count its windows. She climbed the hill with a "
    "notebook, "
    "a loaf of bread and a key that did not fit, and",
    "\"You said the train left at nine,\" Tomas whispered.\n\"I said it leaves from platform nine,\" Ida answered. \"At half "
    "past seven.\"\n",
    "def merge_intervals(intervals):\n    \"\"\"Merge overlapping closed intervals given as (start, end) pairs.\"\"\"\n    "
    "intervals = "
    "sorted(intervals)\n    merged = []\n    for start, end in intervals:\n",
    "Things to bring on a three-day walk in the mountains:\n1. A paper map of the region\n2. Two litres of water\n3. A wool "
    "hat\n",
    "Question: A shop sells pencils at 4 for 3 euros. How much do 28 pencils cost?\nAnswer: 28 / 4 = 7 groups, and 7 * 3 = 21 "
    "euros.\n"
    "Question: A tank of 240 litres loses 5 litres an hour. When is it half empty?\nAnswer:",
    "Glaciers move because ice under pressure deforms slowly. The lower layers slide over a film of meltwater, while the "
    "surface "
    "breaks into crevasses where the slope becomes steeper. As a result,",
    "Dear Ms Okafor,\n\nthank you for your letter of 3 March about the broken gate. Our caretaker went to see it on Tuesday "
    "and",
    "#include <vector>\n\n// Returns the index of the first element not less than value.\nsize_t lower_bound(const "
    "std::vector<int>& v, int value) {\n",
    "The recipe is older than the village. Melt the butter slowly, add flour until the paste comes away from the pan, and only "
    "then "
    "pour in the warm milk, a little at a time. When",
    "User: My bicycle chain keeps slipping when I climb a hill. What should I check first?\nAssistant: First look at the wear "
    "of the chain. ",
    "In the year of the long drought the council of the river towns met in Veldra. The delegates agreed on three points: "
    "first, that "
    "no mill should run on Sundays; second,",
    "| city | population | river |\n|---|---|---|\n| Arles | 50,000 | Rhone |\n| Porto | 230,000 | Douro |\n| Basel |",
    "A short history of the umbrella: it began as shade for kings, became a tool of vicars, and ended forgotten on trains. In "
    "the "
    "eighteenth century",
    "Let n be an odd integer. Then n = 2k + 1 for some integer k, and n squared equals 4k^2 + 4k + 1, which is again odd. "
    "Conversely,",
    "Weather report for the northern coast. Tonight: light winds from the west, clear at first, clouds from midnight. "
    "Tomorrow:",
    "He spoke of the orchard as one speaks of a relative. The pear trees by the wall, he said, were stubborn; the plums were "
    "generous "
    "and foolish; but the quince",
};

// Tokens that would end a text, so that continuations reach their length.
std::vector<Token> end_tokens(const Model& model) {
  std::vector<Token> ends;
  for (Token t = 0; t < model.vocab_size(); ++t) {
    if (model.is_end(t)) ends.push_back(t);
  }
  return ends;
}

std::vector<std::vector<Token>> own_prompts(std::shared_ptr<const Model> model, const CalibrationOptions& options, int threads,
                                            const Progress& progress) {
  EngineOptions engine_options;
  engine_options.device = options.device;
  engine_options.threads = threads;
  Engine engine(model, f16_plan(model->shape()), engine_options);
  const std::vector<Token> ends = end_tokens(*model);
  const auto length = static_cast<size_t>(options.tokens);
  constexpr size_t kTogether = 16;
  std::vector<std::vector<Token>> out;
  const double total = static_cast<double>(options.prompts) * options.tokens;
  double done = 0;
  const auto report = [&](size_t n) {
    done += static_cast<double>(n);
    if (progress && !progress(std::min(done, total), total, "writing calibration text")) {
      throw Error(Status::kCancelled, "stopped while writing calibration text");
    }
  };
  for (size_t first = 0; first < static_cast<size_t>(options.prompts); first += kTogether) {
    const size_t count = std::min(kTogether, static_cast<size_t>(options.prompts) - first);
    std::vector<std::vector<Token>> texts(count);
    std::vector<SequenceId> ids;
    std::vector<Sampler> samplers;
    for (size_t i = 0; i < count; ++i) {
      const size_t index = first + i;
      texts[i] = model->tokenize(kPrompts[index % kPrompts.size()], true);
      texts[i].resize(std::min(texts[i].size(), length));
      ids.push_back(engine.cache().create());
      // Close to the model's own distribution: cut tails make text so predictable that errors hardly show.
      SamplingOptions sampling{.temperature = 1.0f, .top_k = 1000, .top_p = 1.0f, .min_p = 0.0f};
      sampling.seed = options.seed * 1000003 + index;
      samplers.emplace_back(sampling);
    }
    std::vector<float> row;
    const auto next = [&](size_t i, std::span<const float> logits) {
      row.assign(logits.begin(), logits.end());
      for (const Token t : ends) row[static_cast<size_t>(t)] = -INFINITY;
      texts[i].push_back(samplers[i].sample(row));
    };
    for (size_t i = 0; i < count; ++i) {
      const auto logits = engine.prefill(ids[i], texts[i]);
      report(texts[i].size());
      if (texts[i].size() < length) next(i, logits);
    }
    std::vector<EngineItem> items;
    std::vector<size_t> active;
    for (;;) {
      items.clear();
      active.clear();
      for (size_t i = 0; i < count; ++i) {
        if (texts[i].size() >= length) continue;
        items.push_back({ids[i], {&texts[i].back(), 1}});
        active.push_back(i);
      }
      if (items.empty()) break;
      const auto logits = engine.step(items);
      const auto vocab = static_cast<size_t>(model->vocab_size());
      for (size_t a = 0; a < active.size(); ++a) next(active[a], logits.subspan(a * vocab, vocab));
      report(active.size());
    }
    for (size_t i = 0; i < count; ++i) {
      engine.cache().remove(ids[i]);
      out.push_back(std::move(texts[i]));
    }
  }
  return out;
}

constexpr const char* kProse[] = {
#include "profile/prose.inc"
};

std::vector<std::vector<Token>> text_prompts(const Model& model, const CalibrationOptions& options) {
  std::string content;
  if (options.file == kBuiltInText) {
    for (const char* part : kProse) content += part;
  } else {
    content = read_file(options.file, size_t{1} << 30);
  }
  if (content.starts_with("\xef\xbb\xbf")) content.erase(0, 3);  // a mark of the encoding, not of the text
  const bool jsonl = options.file.ends_with(".jsonl");
  std::vector<std::string> texts;
  if (jsonl) {
    texts = parse_texts(content, options.file);
  } else {
    texts.push_back(content);
  }
  const auto length = static_cast<size_t>(options.tokens);
  std::vector<std::vector<Token>> prompts;
  for (const std::string& text : texts) {
    const std::vector<Token> tokens = model.tokenize(text, false);
    const std::vector<Token> start = model.tokenize("", true);  // BOS where the model wants one
    for (size_t at = 0; at < tokens.size() && prompts.size() < static_cast<size_t>(options.prompts); at += length) {
      std::vector<Token> prompt = start;
      const size_t n = std::min(length - start.size(), tokens.size() - at);
      prompt.insert(prompt.end(), tokens.begin() + static_cast<ptrdiff_t>(at), tokens.begin() + static_cast<ptrdiff_t>(at + n));
      if (prompt.size() >= std::min<size_t>(length, 16)) prompts.push_back(std::move(prompt));
      if (jsonl) break;  // one prompt a line
    }
  }
  const bool whole = prompts.size() == static_cast<size_t>(options.prompts) && prompts.back().size() == length;
  if (options.file == kBuiltInText && !whole) {
    throw Error(Status::kInvalidArgument, "the built-in text has " + std::to_string(model.tokenize(content, false).size()) +
                                              " tokens, too few for " + std::to_string(options.prompts) + " prompts of " +
                                              std::to_string(options.tokens) +
                                              "; take fewer or shorter ones, or a longer text");
  }
  if (prompts.empty()) {
    throw Error(Status::kInvalidArgument,
                options.file + ": no text of at least 16 tokens; give more text or leave --calib out");
  }
  return prompts;
}

}  // namespace

uint64_t text_checksum(std::span<const std::vector<Token>> prompts) {
  Checksum sum;
  for (const std::vector<Token>& prompt : prompts) {
    const uint64_t n = prompt.size();
    sum.update(&n, sizeof n);
    sum.update(prompt.data(), prompt.size() * sizeof(Token));
  }
  return sum.value();
}

std::vector<std::vector<Token>> calibration_prompts(std::shared_ptr<const Model> model, const CalibrationOptions& options,
                                                    int threads, const Progress& progress) {
  if (options.prompts < 1 || options.tokens < 16)
    throw Error(Status::kInvalidArgument, "calibration needs at least 1 prompt of 16 tokens");
  if (options.tokens > model->shape().context_tokens) {
    throw Error(Status::kInvalidArgument, "calibration prompts of " + std::to_string(options.tokens) +
                                              " tokens exceed the model's context of " +
                                              std::to_string(model->shape().context_tokens) + "; take shorter ones");
  }
  return options.file.empty() ? own_prompts(std::move(model), options, threads, progress) : text_prompts(*model, options);
}

}  // namespace kvmix
