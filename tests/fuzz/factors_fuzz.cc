// Factors files from anybody: whatever the bytes, reading ends in factors that fit each other or in an Error.
#include <numeric>
#include <stdexcept>
#include <string>

#include "engine/factors_file.h"
#include "engine/model.h"
#include "fuzz/memory_file.h"
#include "fuzz/target.h"
#include "kvmix/error.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

void check_side(const SideFactors& s) {
  const auto groups = static_cast<size_t>(s.groups), rank = static_cast<size_t>(s.rank);
  const size_t outputs = s.energies.size();
  bool fits = s.groups > 0 && s.rank > 0 && s.group_of.size() % groups == 0 && outputs % s.group_of.size() == 0 &&
              rank * groups <= outputs && s.up.size() == outputs * rank && s.down.size() % (groups * rank) == 0;
  for (const int g : s.group_of) fits = fits && g >= 0 && g < s.groups;
  if (!fits) throw std::logic_error("accepted factors do not fit each other");
}

// As the engine's checks find factors before it uses them, but for the model.
bool accepts(const std::string& input) {
  const fuzz::MemoryFile file(input);
  try {
    const Factors factors = read_factors(file.path());
    for (const Factors::Layer& layer : factors.layers) {
      check_side(layer.key);
      check_side(layer.value);
    }
    Plan plan;
    plan.model = plan.fingerprint = plan.planner = "m";
    plan.layers.resize(factors.layers.size());
    const Plan with = with_factors(plan, inspect_factors(file.path()));
    if (with.layers[0].key_rank != factors.layers[0].key.groups * factors.layers[0].key.rank)
      throw std::logic_error("a plan has other ranks than its factors");
    return true;
  } catch (const Error&) {
    return false;
  }
}

SideFactors side(int heads, int groups, int rank, int head_dim, int model_dim) {
  SideFactors s;
  s.groups = groups;
  s.rank = rank;
  for (int h = 0; h < heads; ++h) s.group_of.push_back(h % groups);
  const auto numbers = [](int n) {
    std::vector<float> out(static_cast<size_t>(n));
    std::iota(out.begin(), out.end(), -3.0f);
    return out;
  };
  s.down = numbers(groups * rank * model_dim);
  s.up = numbers(heads * head_dim * rank);
  s.energies = numbers(heads * head_dim);
  return s;
}

// Header and tensors' list are where sizes are; what lies behind them is numbers.
fuzz::Seed seed(const Factors& factors) {
  const testing::TemporaryFolder folder("kvmix-fuzz");
  const std::string path = folder.file("factors.gguf");
  write_factors(factors, path);
  const std::unique_ptr<gguf_context, Freer<gguf_free>> gguf(gguf_init_from_file(path.c_str(), {true, nullptr}));
  return {testing::read_bytes(path), gguf_get_data_offset(gguf.get())};
}

std::vector<fuzz::Seed> seeds() {
  Factors one;
  one.method = "lorc";
  one.model = one.fingerprint = "m";
  one.layers.push_back({side(1, 1, 4, 8, 4), side(1, 1, 8, 8, 4)});
  Factors grouped = one;
  grouped.method = "recalkv";
  grouped.note = "asked to keep 0.500, keeps 0.5000; 1 windows of text";
  grouped.layers = {{side(4, 2, 2, 4, 6), side(4, 1, 8, 4, 6)}, {side(4, 2, 4, 4, 6), side(4, 1, 4, 4, 6)}};
  return {seed(one), seed(grouped)};
}

const fuzz::Registered registered({"factors", seeds, accepts, 4000});

}  // namespace
}  // namespace kvmix
