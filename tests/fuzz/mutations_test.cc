// Every fuzz target with a bounded number of fixed mutations: what a fuzzer would do, where there is none.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <random>

#include "fuzz/target.h"

namespace kvmix::fuzz {

void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

namespace {

std::string mutated(const Seed& seed, std::mt19937& random) {
  std::string bytes = seed.bytes;
  for (unsigned edits = 1 + random() % 3; edits > 0 && !bytes.empty(); --edits) {
    const size_t reach = random() % 4 == 0 ? bytes.size() : std::min(bytes.size(), seed.reach);
    const size_t at = random() % reach;
    switch (random() % 5) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << (random() % 8)));
        break;
      case 1: {
        const int64_t odd[] = {0, -1, 1, INT64_MAX, INT64_MIN, int64_t{1} << 32, int64_t{1} << 39, 127, 128, 129};
        const int64_t value = odd[random() % std::size(odd)];
        const size_t width = random() % 2 == 0 ? 4 : 8;
        if (at + width <= bytes.size()) std::memcpy(bytes.data() + at, &value, width);
        break;
      }
      case 2:
        bytes.resize(bytes.size() - std::min(bytes.size() - 1, static_cast<size_t>(random() % 200)));
        break;
      case 3:
        bytes.insert(at, std::string(random() % 64, static_cast<char>(random() % 3)));
        break;
      default: {  // text: a number or a word of JSON in another's place
        const char* words[] = {"0", "-1", "1e999", "9223372036854775808", "null", "{}", "[[]]", "\"\\u0000\"", ",", "nan"};
        const std::string word = words[random() % std::size(words)];
        bytes.replace(at, std::min(bytes.size() - at, 1 + static_cast<size_t>(random() % word.size())), word);
        break;
      }
    }
  }
  return bytes;
}

class Fuzz : public ::testing::TestWithParam<Target> {};

TEST_P(Fuzz, MutatedInputsAreRefusedOrWork) {
  const Target& target = GetParam();
  const std::vector<Seed> seeds = target.seeds();
  std::mt19937 random(3);
  int accepted = 0, refused = 0;
  for (const Seed& seed : seeds) {
    ASSERT_TRUE(target.accepts(seed.bytes));
    for (size_t i = 0; i < static_cast<size_t>(target.mutations) / seeds.size(); ++i)
      ++(target.accepts(mutated(seed, random)) ? accepted : refused);
  }
  EXPECT_GT(accepted, 0);
  EXPECT_GT(refused, 0);
  RecordProperty("accepted", accepted);
  RecordProperty("refused", refused);
}

INSTANTIATE_TEST_SUITE_P(Targets, Fuzz, ::testing::ValuesIn(targets()),
                         [](const auto& parameter) { return std::string(parameter.param.name); });

}  // namespace
}  // namespace kvmix::fuzz
