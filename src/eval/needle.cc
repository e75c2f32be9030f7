// Retrieval: something hidden at a depth of distractor text, asked for at the end, answered greedily. To add a kind of needle:
// a function that makes it and a line in kKinds.
#include <algorithm>
#include <cmath>
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

// What is hidden, how it is asked for, and what the answer begins with.
struct Needle {
  std::string hidden, question, answer;
};

template <size_t n>
std::string draw(std::mt19937_64& random, const char* const (&list)[n]) {
  return list[random() % n];
}

Needle passkey(std::mt19937_64& random, int) {
  const std::string key = std::to_string(10000 + random() % 90000);
  return {"The pass key is " + key + ". Remember it. " + key + " is the pass key. ", "\nWhat is the pass key? The pass key is",
          key};
}

// Who or what the needle'th of several is about: another one for each.
template <size_t n, size_t m>
std::string subject(const char* const (&first)[n], const char* const (&second)[m], int needle) {
  const auto i = static_cast<size_t>(needle);
  return std::string(first[i % n]) + " " + second[(i + i / n) % m];
}
constexpr const char* kColours[] = {"red", "blue", "green", "white", "black", "yellow", "brown", "grey"};
constexpr const char* kPlaces[] = {"door", "gate", "tower", "cellar", "barn", "chest", "cabin", "vault", "garage"};
constexpr const char* kTitles[] = {"Captain", "Doctor", "Judge", "Father", "Sister", "Professor", "Lady", "Sergeant"};
constexpr const char* kNames[] = {"Ross", "Miller", "Ortega", "Lund", "Baker", "Novak", "Hale", "Iversen", "Dunn"};

Needle one_of_many_keys(std::mt19937_64& random, int needle) {
  const std::string key = std::to_string(10000 + random() % 90000),
                    what = "pass key of the " + subject(kColours, kPlaces, needle);
  return {"The " + what + " is " + key + ". Remember it. " + key + " is the " + what + ". ",
          "\nWhat is the " + what + "? The " + what + " is", key};
}

Needle quoted_sentence(std::mt19937_64& random, int needle) {
  static constexpr const char* kCount[] = {"two", "three", "four", "five", "six", "seven", "eight", "nine"};
  static constexpr const char* kLooks[] = {"copper", "hungry", "broken", "silent", "golden", "crooked", "frozen", "velvet"};
  static constexpr const char* kThings[] = {"kettles", "sailors", "ladders", "pigeons",
                                            "candles", "violins", "barrels", "foxes"};
  static constexpr const char* kDo[] = {"wait behind", "travel without", "sleep under", "argue about",
                                        "sing beside", "vanish into",    "guard",       "follow"};
  static constexpr const char* kOther[] = {"the harbour wall", "a wooden bridge", "the kitchen table", "an orange tent",
                                           "the last train",   "a paper moon",    "the chapel roof",   "an iron fence"};
  const std::string who = subject(kTitles, kNames, needle), count = draw(random, kCount), looks = draw(random, kLooks);
  const std::string things = draw(random, kThings), act = draw(random, kDo), other = draw(random, kOther);
  const std::string said = count + " " + looks + " " + things + " " + act + " " + other;
  return {who + " told us that " + said + ". ", "\nWhat did " + who + " tell us? " + who + " told us that", said};
}

Needle rare_word(std::mt19937_64& random, int needle) {
  static constexpr const char* kWords[] = {"zephyr",  "marmalade", "obelisk", "quartz",  "lantern", "saffron",
                                           "walrus",  "trombone",  "gondola", "nutmeg",  "pelican", "thimble",
                                           "mustard", "acrobat",   "magnet",  "hammock", "glacier", "parsley",
                                           "anchor",  "biscuit",   "cactus",  "dolphin", "emerald", "falcon"};
  const std::string who = subject(kTitles, kNames, needle), word = draw(random, kWords);
  return {"The secret word of " + who + " is " + word + ". ",
          "\nWhat is the secret word of " + who + "? The secret word of " + who + " is", word};
}

struct Kind {
  const char* name;
  bool together;  // a needle at each depth of one haystack; else one needle that stands at one depth after the other
  Needle (*make)(std::mt19937_64&, int needle);
};
constexpr Kind kKinds[] = {
    {"key", false, passkey}, {"keys", true, one_of_many_keys}, {"quote", true, quoted_sentence}, {"word", true, rare_word}};

const Kind& kind_of(const std::string& name) {
  const auto* const found = std::ranges::find_if(kKinds, [&](const Kind& k) { return name == k.name; });
  if (found == std::end(kKinds)) {
    std::string known;
    for (const Kind& kind : kKinds) known += (known.empty() ? "" : ", ") + std::string(kind.name);
    throw Error(Status::kInvalidArgument, "no needle '" + name + "'; there are " + known);
  }
  return *found;
}

struct Question {
  std::vector<Token> prompt, answer;
  std::string wanted;
};
using Trial = std::vector<Question>;  // by depth

// The same words for every subject. What is before the first difference of two depths' prompts is run once.
Trial make_trial(const Model& model, const NeedleOptions& options, const Kind& kind, int64_t context, int trial) {
  std::mt19937_64 random(options.seed * 1000003 + static_cast<uint64_t>(context) * 101 + static_cast<uint64_t>(trial));
  std::vector<Needle> needles;
  std::string hidden, longest;
  int64_t answer = kAnswerTokens;
  for (size_t i = 0; i < (kind.together ? options.depths.size() : 1); ++i) {
    const Needle& needle = needles.emplace_back(kind.make(random, static_cast<int>(i)));
    hidden += needle.hidden;
    if (needle.question.size() > longest.size()) longest = needle.question;
    answer = std::max(answer, static_cast<int64_t>(model.tokenize(needle.answer, false).size()) + kAnswerTokens / 2);
  }
  const auto room = context - answer - static_cast<int64_t>(model.tokenize(hidden + longest, true).size()) - 8;
  std::vector<std::string> sentences;
  int64_t used = 0;
  for (;;) {
    const std::string sentence = distractor(random);
    const auto n = static_cast<int64_t>(model.tokenize(sentence, false).size());
    if (used + n > room) break;
    used += n;
    sentences.push_back(sentence);
  }
  // Before which sentence a needle stands.
  const auto place = [&](size_t depth) {
    return static_cast<size_t>(options.depths[depth] * static_cast<double>(sentences.size()));
  };
  Trial made;
  for (size_t d = 0; d < options.depths.size(); ++d) {
    std::string text;
    for (size_t i = 0; i <= sentences.size(); ++i) {
      for (size_t n = 0; n < needles.size(); ++n) {
        if (place(kind.together ? n : d) == i) text += needles[n].hidden;
      }
      if (i < sentences.size()) text += sentences[i];
    }
    const Needle& needle = needles[kind.together ? d : 0];
    Question& question = made.emplace_back();
    question.wanted = needle.answer;
    question.prompt = model.tokenize(text + needle.question, true);
    const auto whole = model.tokenize(text + needle.question + " " + needle.answer, true);
    const auto differ = std::ranges::mismatch(question.prompt, whole);
    question.prompt.erase(differ.in1, question.prompt.end());
    question.answer.assign(differ.in2, whole.end());
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

std::vector<std::string> needle_kinds() {
  std::vector<std::string> names;
  names.reserve(std::size(kKinds));
  for (const Kind& kind : kKinds) names.emplace_back(kind.name);
  return names;
}

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
  const auto marks = [&](const Trial& trial, size_t i, size_t marked) {
    const auto& prompt = trial[order[i]].prompt;
    return i + 1 < order.size() ? shared_tokens(prompt, trial[order[i + 1]].prompt, marked) : marked;
  };
  std::vector<std::vector<Trial>> trials;  // by context, kind
  double total = 0, done = 0;
  for (const int64_t context : options.contexts) {
    for (const std::string& kind : options.kinds) {
      auto& list = trials.emplace_back();
      for (int t = 0; t < options.trials; ++t) {
        const Trial& trial = list.emplace_back(make_trial(*model, options, kind_of(kind), context, t));
        size_t marked = 0;
        for (size_t i = 0; i < order.size(); ++i) {
          total += static_cast<double>((trial[order[i]].prompt.size() - 1 - marked) * subjects.size());
          marked = marks(trial, i, marked);
        }
      }
    }
  }
  std::vector<NeedleCell> cells;
  for (const EvalSubject& subject : subjects) {
    for (size_t c = 0; c < trials.size(); ++c) {
      const std::string& kind = options.kinds[c % options.kinds.size()];
      ContenderOptions contender;
      contender.context = options.contexts[c / options.kinds.size()];
      contender.threads = options.threads;
      contender.device = options.device;
      contender.kernel = options.kernel;
      contender.exact = options.exact;
      contender.force_plan = options.force_plan;
      const size_t first = cells.size();
      for (const double depth : options.depths) {
        NeedleCell& cell = cells.emplace_back();
        cell.name = subject.name, cell.kind = kind, cell.context = contender.context, cell.depth = depth;
      }
      const auto show = [&] {
        if (options.on_cells) options.on_cells(std::span<const NeedleCell>(cells).subspan(first));
      };
      std::unique_ptr<Contender> row;
      try {
        row = make_contender(model, subject, contender);
      } catch (const Error& e) {
        if (subject.plan) throw;
        for (size_t i = first; i < cells.size(); ++i) cells[i].lost = e.what();
        show();
        continue;
      }
      int hits = 0, asked = 0;
      double kept = 0, bits = 0;
      const double elements = f16_elements(model->shape(), contender.context);
      const auto feed = [&](std::span<const Token> tokens, bool again) {
        for (size_t i = 0; i < tokens.size(); i += kChunk) {
          const size_t n = std::min(kChunk, tokens.size() - i);
          row->feed(tokens.subspan(i, n), false);
          if (!again) done += static_cast<double>(n);
          const std::string found = std::to_string(hits) + " of " + std::to_string(asked) + " found";
          if (progress &&
              !progress(done, total, subject.name + ", " + kind + " at " + std::to_string(contender.context) + ", " + found))
            throw Error(Status::kCancelled, "stopped during retrieval");
        }
      };
      const auto next = [&](Token token) { return row->decode({&token, 1}).first(vocab); };
      // The right answer, token by token; whether each was the most likely one.
      const auto score = [&](Token token, std::span<const Token> right, NeedleCell& cell) {
        bool first_choice = true;
        for (const Token answer : right) {
          const auto logits = next(token);
          const float mine = logits[static_cast<size_t>(answer)];
          float best = -INFINITY, best_other = -INFINITY;
          double sum = 0;
          for (size_t i = 0; i < vocab; ++i) {
            best = std::max(best, logits[i]);
            if (i != static_cast<size_t>(answer)) best_other = std::max(best_other, logits[i]);
          }
          for (const float logit : logits) sum += std::exp(static_cast<double>(logit - best));
          cell.nll += std::log(sum) + best - mine;
          cell.margin += mine - best_other;
          ++cell.answer_tokens;
          first_choice = first_choice && mine > best_other;
          token = answer;
        }
        return first_choice;
      };
      const auto answer = [&](Token token, size_t most) {
        std::string text;
        for (size_t t = 0; t < most; ++t) {
          const auto logits = next(token);
          token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
          if (model->is_end(token)) break;
          text += model->token_text(token);
        }
        return text;
      };
      for (const Trial& trial : trials[c]) {
        row->clear();
        row->mark();
        size_t marked = 0;
        for (size_t i = 0; i < order.size(); ++i) {
          const Question& question = trial[order[i]];
          const std::span<const Token> prompt(question.prompt);
          NeedleCell& cell = cells[first + order[i]];
          row->rewind();
          row->set_prompt(static_cast<int64_t>(prompt.size()) - 1);
          if (const size_t shared = marks(trial, i, marked); shared > marked) {
            feed(prompt.subspan(marked, shared - marked), false);
            marked = shared;
            row->mark();
          }
          const auto rest = prompt.subspan(marked, prompt.size() - 1 - marked);
          feed(rest, false);
          kept += row->kept(static_cast<int64_t>(prompt.size()) - 1);
          // Where every token of the answer was the most likely one, that is what would have been written.
          std::string said = question.wanted;
          if (!score(prompt.back(), question.answer, cell)) {
            row->rewind();
            feed(rest, true);
            said = answer(prompt.back(), std::max<size_t>(kAnswerTokens, question.answer.size() + kAnswerTokens / 2));
          }
          const bool hit = said.find(question.wanted) != std::string::npos;
          cell.answers.push_back(std::move(said));
          cell.hits += hit ? 1 : 0;
          ++cell.trials;
          hits += hit ? 1 : 0;
          ++asked;
        }
        // What was marked stands on pages of its own; a fork of the sequence does not.
        row->mark();
        bits += static_cast<double>(row->cache_bytes(contender.context)) * 8 / elements;
      }
      for (size_t i = first; i < cells.size(); ++i) {
        cells[i].nll /= std::max(1, cells[i].answer_tokens);
        cells[i].margin /= std::max(1, cells[i].answer_tokens);
        cells[i].kept = kept / asked;
        cells[i].bits_per_element = bits / options.trials;
      }
      show();
    }
  }
  return cells;
}

Interval confidence(int hits, int trials) {
  if (trials == 0) return {0, 1};
  constexpr double z = 1.96;
  const double n = trials, share = hits / n, centre = share + z * z / (2 * n);
  const double width = z * std::sqrt(share * (1 - share) / n + z * z / (4 * n * n)), scale = 1 + z * z / n;
  return {std::max(0.0, (centre - width) / scale), std::min(1.0, (centre + width) / scale)};
}

}  // namespace kvmix
