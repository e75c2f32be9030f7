// Passkey retrieval: a number hidden at a depth of distractor text, asked for at the end, answered greedily.
#include <algorithm>
#include <random>
#include <thread>

#include "eval/contender.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr int kAnswerTokens = 12;

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
  double total = 0, done = 0;
  for (const int64_t context : options.contexts) {
    total += static_cast<double>(context) * static_cast<double>(options.depths.size() * subjects.size()) * options.trials;
  }
  std::vector<NeedleCell> cells;
  for (const EvalSubject& subject : subjects) {
    for (const int64_t context : options.contexts) {
      ContenderOptions contender;
      contender.context = context;
      contender.threads = options.threads;
      contender.force_plan = options.force_plan;
      const auto row = make_contender(model, subject, contender);
      for (size_t d = 0; d < options.depths.size(); ++d) {
        NeedleCell cell{subject.name, context, options.depths[d], 0, options.trials};
        for (int trial = 0; trial < options.trials; ++trial) {
          // The same haystack for every subject.
          std::mt19937_64 random(options.seed * 1000003 + static_cast<uint64_t>(context) * 101 + d * 17 +
                                 static_cast<uint64_t>(trial));
          const std::string key = std::to_string(10000 + random() % 90000);
          const std::string needle = "The pass key is " + key + ". Remember it. " + key + " is the pass key. ";
          const std::string question = "\nWhat is the pass key? The pass key is";
          const auto room = context - kAnswerTokens - static_cast<int64_t>(model->tokenize(needle + question, true).size()) - 8;
          std::vector<std::string> sentences;
          int64_t used = 0;
          for (;;) {
            const std::string sentence = distractor(random);
            const auto n = static_cast<int64_t>(model->tokenize(sentence, false).size());
            if (used + n > room) break;
            used += n;
            sentences.push_back(sentence);
          }
          const auto at = static_cast<size_t>(options.depths[d] * static_cast<double>(sentences.size()));
          std::string text;
          for (size_t i = 0; i < sentences.size(); ++i) text += (i == at ? needle : "") + sentences[i];
          if (at >= sentences.size()) text += needle;
          const std::vector<Token> prompt = model->tokenize(text + question, true);

          row->clear();
          const std::span<const Token> all(prompt);
          constexpr size_t kChunk = 512;
          for (size_t i = 0; i + 1 < all.size(); i += kChunk) {
            const size_t n = std::min(kChunk, all.size() - 1 - i);
            row->feed(all.subspan(i, n), false);
            done += static_cast<double>(n);
            if (progress && !progress(std::min(done, total), total, subject.name))
              throw Error(Status::kCancelled, "stopped during retrieval");
          }
          Token token = all.back();
          std::string answer;
          for (int t = 0; t < kAnswerTokens; ++t) {
            const auto logits = row->decode({&token, 1}).first(vocab);
            token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
            if (model->is_end(token)) break;
            answer += model->token_text(token);
          }
          if (answer.find(key) != std::string::npos) ++cell.hits;
        }
        cells.push_back(cell);
      }
    }
  }
  return cells;
}

}  // namespace kvmix
