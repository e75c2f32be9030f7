// Policies by name: what is listed, and what is refused in one line.
#include "policy/parameters.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace kvmix {
namespace {

std::string refusal(const PolicySpec& spec) {
  try {
    check_policy(spec);
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), Status::kInvalidArgument);
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "";
}

TEST(PolicyList, IsComplete) {
  std::set<std::string> names;
  for (const PolicyInfo& info : policies()) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name;
    EXPECT_FALSE(info.description.empty());
    EXPECT_FALSE(info.paper.empty());
    std::set<std::string> parameters;
    for (const PolicyParameter& p : info.parameters) {
      EXPECT_TRUE(parameters.insert(p.name).second) << info.name << " " << p.name;
      EXPECT_FALSE(p.help.empty());
      EXPECT_FALSE(default_text(p).empty());
      EXPECT_EQ(p.kind == PolicyParameter::Kind::kChoice, !p.choices.empty());
      EXPECT_LE(p.low, p.fallback);
      EXPECT_LE(p.fallback, p.high);
    }
    EXPECT_EQ(refusal({info.name, {}}), "");
  }
  for (const char* name :
       {"adakv", "dbudgetkv", "h2o", "kvcrush", "leankv", "pyramidkv", "quantized-pruning", "snapkv", "streaming"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

TEST(PolicyList, EveryParameterIsChecked) {
  for (const PolicyInfo& info : policies()) {
    for (const PolicyParameter& p : info.parameters) {
      SCOPED_TRACE(info.name + " " + p.name);
      std::vector<PolicyValue> bad = {std::string("nonsense"), std::string("")};
      if (p.kind == PolicyParameter::Kind::kChoice) {
        bad.emplace_back(1.0);
      } else {
        bad.insert(bad.end(), {p.low - 1, p.high + 1, std::nan(""), std::string("1x")});
        if (p.kind == PolicyParameter::Kind::kInteger) bad.emplace_back(p.low + 0.5);
      }
      for (const PolicyValue& value : bad) {
        const std::string said = refusal({info.name, {{p.name, value}}});
        EXPECT_NE(said.find("token policy " + info.name + ": " + p.name + " is "), std::string::npos) << said;
        EXPECT_NE(said.find("; expected "), std::string::npos) << said;
      }
    }
  }
}

TEST(PolicyErrors, SayWhatThereIs) {
  std::string names;
  for (const PolicyInfo& info : policies()) names += (names.empty() ? "" : ", ") + info.name;
  EXPECT_EQ(names.rfind("streaming, h2o, snapkv, pyramidkv", 0), 0u) << names;
  EXPECT_EQ(refusal({"snapvk", {}}), "token policy \"snapvk\" is unknown; expected one of " + names);
  EXPECT_EQ(refusal({"streaming", {{"windw", 3.0}}}),
            "token policy streaming: has no parameter \"windw\"; it has keep, tokens, sinks, decode");
  EXPECT_EQ(refusal({"snapkv", {{"keep", 1.5}}}), "token policy snapkv: keep is 1.5; expected a number from 1e-06 to 1");
  EXPECT_EQ(refusal({"snapkv", {{"pooling", "mean"}}}),
            "token policy snapkv: pooling is \"mean\"; expected one of max, avg, none");
  EXPECT_EQ(refusal({"snapkv", {{"kernel", 4.0}}}), "token policy snapkv: kernel is 4; expected an odd number");
  EXPECT_EQ(refusal({"snapkv", {{"keep", 0.5}, {"tokens", 100.0}}}),
            "token policy snapkv: both keep and tokens are given; a budget is one of them");
  EXPECT_EQ(
      refusal({"snapkv", {{"sinks", 4.0}, {"tokens", 35.0}}}),
      "token policy snapkv: tokens is 35, fewer than the 36 that sinks and window always keep; raise tokens or lower those");
  EXPECT_EQ(
      refusal({"kvcrush", {{"tokens", 159.0}}}),
      "token policy kvcrush: tokens is 159, fewer than the 160 that sinks and window always keep; raise tokens or lower those");
  EXPECT_EQ(refusal({"leankv", {{"low", 2.0}}}),
            "token policy leankv: low is above high; tokens below low are dropped, those below high lose precision");
  EXPECT_EQ(refusal({"leankv", {{"low-k-bits", 7.0}}}),
            "token policy leankv: low-k-bits is 7; expected 1 to 6, 8 or 16, or 0 for the plan's");
  EXPECT_EQ(refusal({"quantized-pruning", {{"host", "h2o"}, {"window", 8.0}}}),
            "token policy quantized-pruning: the host h2o has no window");
  EXPECT_EQ(refusal({"quantized-pruning", {{"keep", 0.5}, {"tokens", 100.0}}}),
            "token policy quantized-pruning: both keep and tokens are given; a budget is one of them");
}

TEST(PolicyValues, NumbersMayBeText) {
  EXPECT_EQ(refusal({"snapkv", {{"keep", "0.5"}, {"window", "16"}}}), "");
  EXPECT_EQ(make_policy({"snapkv", {{"window", "16"}}})->needs().window_queries, 16);
  EXPECT_EQ(to_string(PolicySpec{"snapkv", {{"keep", 0.25}, {"window", "16"}, {"pooling", "avg"}}}),
            "snapkv keep=0.25 pooling=avg window=16");
}

TEST(ParsePolicy, ReadsWhatToStringWrites) {
  for (const char* text : {"snapkv keep=0.25 pooling=avg window=16", "h2o", "leankv high=1.5 low=0.02"}) {
    EXPECT_EQ(to_string(parse_policy(text)), text);
  }
  const PolicySpec spec = parse_policy("  snapkv   keep=0.5 ");
  EXPECT_EQ(spec, (PolicySpec{"snapkv", {{"keep", 0.5}}}));
  for (const auto& [text, part] : {std::pair{"", "\"\" is unknown"}, std::pair{"snapkv keep", "'keep' is no parameter"},
                                   std::pair{"snapkv =1", "'=1' is no parameter"}, std::pair{"snapkv keep=1 keep=1", "twice"},
                                   std::pair{"snapkv keep=half", "expected a number"}, std::pair{"keep=0.5", "unknown"}}) {
    try {
      parse_policy(text);
      FAIL() << text << " was accepted";
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
    }
  }
}

// Whole products may come out a hair below.
TEST(Budget, FractionsAreOfThePrompt) {
  const LayerShape shape;
  for (int percent = 1; percent <= 100; ++percent) {
    const Budget budget{.keep = percent / 100.0};
    EXPECT_EQ(budget.capacity(shape, 100, {}), percent);
    EXPECT_EQ(budget.capacity(shape, 4100, {}), 41 * percent);
  }
  EXPECT_EQ(Budget{.keep = 0.1}.capacity(shape, 99, {}), 9);
  EXPECT_EQ(Budget{.keep = 0.1}.capacity(shape, 99, {4, 32}), 36);
  EXPECT_EQ((Budget{.keep = 0.1, .tokens = 70}.capacity(shape, 99, {4, 32})), 70);
}

// 9.9 tokens in fp16 are nine: 9 * 256 / 72 = 32 others.
TEST(Budget, BytesOfWholeTokens) {
  LayerShape shape;
  shape.head_dim = 64;
  shape.token_bytes = {72, 0};
  const Budget budget{.keep = 0.1, .f16_bytes = true};
  EXPECT_EQ(budget.capacity(shape, 99, {}), 32);
  shape.token_bytes = {};
  EXPECT_THROW(budget.capacity(shape, 99, {}), Error);
}

}  // namespace
}  // namespace kvmix
