#include "profile/recall.h"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <random>
#include <string>

namespace kvmix {
namespace {

constexpr size_t kMostFacts = 12, kMostPassages = 6;
constexpr size_t kPassage = 14, kCue = 8;  // tokens of a passage, and of it those that are no answers

constexpr const char* kFirst[] = {"Maren", "Joris", "Talia", "Edwin", "Noor", "Silas"};
constexpr const char* kLast[] = {"Holt", "Abara", "Quist", "Venn", "Ruskin", "Lake", "Moreau"};
constexpr const char* kWords[] = {"amber",  "cobalt",  "willow", "granite", "velour",
                                  "cinder", "juniper", "marble", "otter",   "plume"};

struct Fact {
  std::vector<Token> tokens;
  size_t begin = 0, end = 0;  // of the answer
};

// Every second one has a number, the others two words.
Fact make_fact(const Model& model, size_t i, std::mt19937_64& random) {
  const auto word = [&] { return std::string(kWords[random() % std::size(kWords)]); };
  const std::string who =
      std::string(kFirst[i % std::size(kFirst)]).append(" ").append(kLast[(i * 5 + i / 6) % std::size(kLast)]);
  const bool number = i % 2 == 0;
  const std::string cue = std::string(number ? " Ticket of " : " ").append(who).append(number ? ":" : " has chosen");
  const std::string said = number ? std::to_string(10000 + random() % 90000) : word().append(" ").append(word());
  const std::string whole = std::string(cue).append(" ").append(said);
  Fact fact;
  fact.tokens = model.tokenize(std::string(whole).append("."), false);
  const auto shared = [&](const std::string& start) {
    const std::vector<Token> tokens = model.tokenize(start, false);
    return static_cast<size_t>(std::ranges::mismatch(tokens, fact.tokens).in2 - fact.tokens.begin());
  };
  fact.begin = shared(cue);
  fact.end = shared(whole);
  return fact;
}

}  // namespace

RecallText recall_text(const Model& model, std::span<const Token> text, uint64_t seed) {
  std::mt19937_64 random(seed);
  const size_t length = text.size();
  std::vector<Fact> facts;
  size_t said = 0;
  while (facts.size() < kMostFacts) {
    Fact fact = make_fact(model, facts.size(), random);
    if (said + fact.tokens.size() > length / 6) break;
    said += fact.tokens.size();
    facts.push_back(std::move(fact));
  }
  const size_t passages = std::clamp<size_t>(length / 16 / kPassage, 1, kMostPassages);
  const size_t body = length - 2 * said - passages * kPassage;
  RecallText out;
  out.tokens.reserve(length);
  // Each in its share of the body; the first token may be one that begins every text.
  size_t at = 0;
  for (size_t f = 0; f < facts.size(); ++f) {
    const size_t share = body / facts.size();
    const size_t place = std::max<size_t>(1, f * share + random() % std::max<size_t>(1, share));
    for (; at < place; ++at) out.tokens.push_back(text[at]);
    out.tokens.insert(out.tokens.end(), facts[f].tokens.begin(), facts[f].tokens.end());
  }
  for (; at < body; ++at) out.tokens.push_back(text[at]);
  const std::vector<Token> front = out.tokens;
  const auto quote = [&](std::span<const Token> tokens, size_t begin, size_t end) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (i >= begin && i < end && out.answers.size() < kMostAnswers)
        out.answers.push_back(static_cast<int64_t>(out.tokens.size()));
      out.tokens.push_back(tokens[i]);
    }
  };
  std::shuffle(facts.begin(), facts.end(), random);
  for (const Fact& fact : facts) quote(fact.tokens, fact.begin, fact.end);
  for (size_t p = 0; p < passages; ++p)
    quote(std::span(front).subspan(1 + random() % (front.size() - kPassage), kPassage), kCue, kPassage);
  return out;
}

}  // namespace kvmix
