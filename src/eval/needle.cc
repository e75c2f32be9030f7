// Passkey retrieval: a number hidden at a depth of distractor text, asked for at the end, answered greedily.
#include <algorithm>
#include <numeric>
#include <random>

#include "eval/contender.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr int kAnswerTokens = 12;
constexpr size_t kChunk = 512;

// One sentence of distractor text; numbers in it have another form than the passkey.
std::string distractor(std::mt19937_64& random) {
  static const char* kWho[] = {"The baker",    "A sailor",    "The teacher",  "My cousin",
                               "The gardener", "An engineer", "The librarian"};
  static const char* kDid[] = {"walked to",  "wrote about",  "remembered", "painted",
                               "looked for", "talked about", "returned to"};
  static const char* kWhat[] = {"the old mill",     "a quiet valley",   "the northern market",
                                "the stone bridge", "an empty theatre", "the long pier"};
  static const char* kWhen[] = {"in the morning", "before the storm", "after supper", "during the holidays", "late in autumn"};
  const auto pick = [&](const auto& list) { return std::string(list[random() % std::size(list)]); };
  return pick(kWho) + " " + pick(kDid) + " " + pick(kWhat) + " " + pick(kWhen) + ". ";
}

// The same words for every subject, and for every depth of one context and trial but for where the needle stands, so that what
// is before the needle is run once.
struct Trial {
  std::string key;
  std::vector<std::vector<Token>> prompts;  // one a depth
};

Trial make_trial(const Model& model, const NeedleOptions& options, int64_t context, int trial) {
  std::mt19937_64 random(options.seed * 1000003 + static_cast<uint64_t>(context) * 101 + static_cast<uint64_t>(trial));
  Trial made;
  made.key = std::to_string(10000 + random() % 90000);
  const std::string needle = "The pass key is " + made.key + ". Remember it. " + made.key + " is the pass key. ";
  const std::string question = "\nWhat is the pass key? The pass key is";
  const auto room = context - kAnswerTokens - static_cast<int64_t>(model.tokenize(needle + question, true).size()) - 8;
  std::vector<std::string> sentences;
  int64_t used = 0;
  for (;;) {
    const std::string sentence = distractor(random);
    const auto n = static_cast<int64_t>(model.tokenize(sentence, false).size());
    if (used + n > room) break;
    used += n;
    sentences.push_back(sentence);
  }
  for (const double depth : options.depths) {
    const auto at = static_cast<size_t>(depth * static_cast<double>(sentences.size()));
    std::string text;
    for (size_t i = 0; i < sentences.size(); ++i) text += (i == at ? needle : "") + sentences[i];
    if (at >= sentences.size()) text += needle;
    made.prompts.push_back(model.tokenize(text + question, true));
  }
  return made;
}

// Whole chunks at the start of both prompts, and at least `least`: a sequence that was run as far as this stores what each
// prompt would have stored on its own.
size_t shared_tokens(const std::vector<Token>& a, const std::vector<Token>& b, size_t least) {
  const size_t most = std::min(a.size(), b.size()) - 1;
  const auto differ = std::mismatch(a.begin(), a.begin() + static_cast<ptrdiff_t>(most), b.begin()).first;
  return std::max(least, static_cast<size_t>(differ - a.begin()) / kChunk * kChunk);
}

}  // namespace

std::vector<NeedleCell> evaluate_needle(std::shared_ptr<const Model> model, std::span<const EvalSubject> subjects,
                                        const NeedleOptions& options, const Progress& progress) {
  const auto vocab = static_cast<size_t>(model->vocab_size());
  for (const int64_t context : options.contexts) {
    if (context > model->shape().context_tokens || context < 256) {
      throw Error(Status::kInvalidArgument, "a haystack of " + std::to_string(context) + " tokens; this model takes 256 to " +
                                                std::to_string(model->shape().context_tokens));
    }
  }
  // Depths from the first to the last, whatever their order in the request: prompts share what stands before both needles.
  std::vector<size_t> order(options.depths.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return options.depths[a] < options.depths[b]; });
  std::vector<std::vector<Trial>> trials;  // by context
  double total = 0, done = 0;
  for (const int64_t context : options.contexts) {
    auto& list = trials.emplace_back();
    for (int t = 0; t < options.trials; ++t) {
      const Trial& trial = list.emplace_back(make_trial(*model, options, context, t));
      size_t marked = 0;
      for (size_t i = 0; i < order.size(); ++i) {
        const auto& prompt = trial.prompts[order[i]];
        total += static_cast<double>((prompt.size() - 1 - marked) * subjects.size());
        if (i + 1 < order.size()) marked = shared_tokens(prompt, trial.prompts[order[i + 1]], marked);
      }
    }
  }
  std::vector<NeedleCell> cells;
  for (const EvalSubject& subject : subjects) {
    for (size_t c = 0; c < options.contexts.size(); ++c) {
      ContenderOptions contender;
      contender.context = options.contexts[c];
      contender.threads = options.threads;
      contender.force_plan = options.force_plan;
      std::unique_ptr<Contender> row;
      try {
        row = make_contender(model, subject, contender);
      } catch (const Error& e) {
        if (subject.plan) throw;
        const size_t first = cells.size();
        for (const double depth : options.depths) cells.push_back({subject.name, contender.context, depth, 0, 0, e.what()});
        if (options.on_cells) options.on_cells(std::span<const NeedleCell>(cells).subspan(first));
        continue;
      }
      int hits = 0, asked = 0;
      const auto feed = [&](std::span<const Token> tokens) {
        for (size_t i = 0; i < tokens.size(); i += kChunk) {
          const size_t n = std::min(kChunk, tokens.size() - i);
          row->feed(tokens.subspan(i, n), false);
          done += static_cast<double>(n);
          const std::string found = std::to_string(hits) + " of " + std::to_string(asked) + " found";
          if (progress && !progress(done, total, subject.name + " at " + std::to_string(contender.context) + ", " + found))
            throw Error(Status::kCancelled, "stopped during retrieval");
        }
      };
      const auto answer = [&](Token token) {
        std::string text;
        for (int t = 0; t < kAnswerTokens; ++t) {
          const auto logits = row->decode({&token, 1}).first(vocab);
          token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
          if (model->is_end(token)) break;
          text += model->token_text(token);
        }
        return text;
      };
      const size_t first = cells.size();
      for (const double depth : options.depths)
        cells.push_back({subject.name, contender.context, depth, 0, options.trials, {}});
      for (const Trial& trial : trials[c]) {
        row->clear();
        row->mark();
        size_t marked = 0;
        for (size_t i = 0; i < order.size(); ++i) {
          const std::span<const Token> prompt(trial.prompts[order[i]]);
          row->rewind();
          row->set_prompt(static_cast<int64_t>(prompt.size()) - 1);
          if (i + 1 < order.size()) {
            const size_t shared = shared_tokens(trial.prompts[order[i]], trial.prompts[order[i + 1]], marked);
            feed(prompt.subspan(marked, shared - marked));
            marked = shared;
            row->mark();
          }
          feed(prompt.subspan(marked, prompt.size() - 1 - marked));
          const bool hit = answer(prompt.back()).find(trial.key) != std::string::npos;
          cells[first + order[i]].hits += hit ? 1 : 0;
          hits += hit ? 1 : 0;
          ++asked;
        }
      }
      if (options.on_cells) options.on_cells(std::span<const NeedleCell>(cells).subspan(first));
    }
  }
  return cells;
}

}  // namespace kvmix
