#include "plan/steady.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace kvmix {
namespace {

constexpr int kLayers = 12;
const char* const kCodecs[] = {"int2.channel.g128.fitted.zero", "int3.channel.g128.fitted.zero", "trellis4.zero",
                               "trellis5.zero"};

// Costs that are products, of two transforms, times exp(noise).
Profile made(const std::vector<double>& noise) {
  Profile profile;
  size_t at = 0;
  for (int l = 0; l < kLayers; ++l) {
    double width = 1;
    for (const char* codec : kCodecs) {
      width /= 4;
      for (const bool scaled : {false, true}) {
        const double cost = 0.01 * width * (1 + l % 5) * (scaled ? 0.3 + 0.1 * (l % 3) : 1.0);
        const double factor = noise.empty() ? 1.0 : std::exp(noise[at++]);
        profile.sensitivities.push_back(
            {"fisher", l, Side::kKey, codec, scaled ? "scaled-feedback" : "feedback", cost * factor});
      }
    }
  }
  return profile;
}

// Of each cost, in logarithms.
std::vector<double> noise(unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, 0.3);
  std::vector<double> noise(made({}).sensitivities.size());
  for (double& x : noise) x = normal(random);
  return noise;
}

double log_error(const Profile& a, const Profile& b) {
  double sum = 0;
  for (size_t i = 0; i < a.sensitivities.size(); ++i) {
    const double error = std::log(a.sensitivities[i].cost / b.sensitivities[i].cost);
    sum += error * error;
  }
  return std::sqrt(sum / static_cast<double>(a.sensitivities.size()));
}

TEST(Steadied, ProductsStayAsTheyAre) {
  const Profile profile = made({});
  EXPECT_LT(log_error(steadied(profile, "fisher"), profile), 1e-9);
}

TEST(Steadied, NoiseShrinks) {
  const Profile exact = made({}), noisy = made(noise(1));
  const double before = log_error(noisy, exact), after = log_error(steadied(noisy, "fisher"), exact);
  EXPECT_NEAR(before, 0.3, 0.06);
  EXPECT_LT(after, 0.75 * before);
  EXPECT_GT(after, 0.4 * before);  // halfway, so that what layers have of their own stays too
}

TEST(Steadied, OthersStayAsTheyAre) {
  Profile profile = made(noise(2));
  const size_t measured = profile.sensitivities.size();
  profile.sensitivities.push_back({"output", 3, Side::kKey, kCodecs[0], "feedback", 0.7});
  profile.sensitivities.push_back({"fisher", 3, Side::kKey, "int8.token.g64.minmax.zero", "feedback", 0.2, true});
  profile.sensitivities.push_back({"fisher", 3, Side::kKey, kCodecs[0], "plain", 0.0});
  const Profile out = steadied(profile, "fisher");
  for (size_t i = measured; i < profile.sensitivities.size(); ++i)
    EXPECT_EQ(out.sensitivities[i].cost, profile.sensitivities[i].cost);
  const Profile same = steadied(profile, "kl");
  for (size_t i = 0; i < profile.sensitivities.size(); ++i)
    EXPECT_EQ(same.sensitivities[i].cost, profile.sensitivities[i].cost);
}

}  // namespace
}  // namespace kvmix
