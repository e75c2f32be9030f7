// Plans from anybody: one that is read is written and read again as it was, and makes a cache that works, or an Error says why
// it fits no model.
#include <algorithm>
#include <stdexcept>

#include "base/checksum.h"
#include "fuzz/target.h"
#include "kvmix/plan.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

constexpr int kKvHeads = 1, kHeadDim = 32;
constexpr size_t kMostLayers = 3;  // of a plan that is run
constexpr uint64_t kOneOf = 16;    // to be run past a sealed page, which takes long under a sanitizer

bool is_chosen(const std::string& text) {
  Checksum sum;
  sum.update(text.data(), text.size());
  return sum.value() % kOneOf == 0;
}

// Any that fit: the engine has them from a file of their own.
std::shared_ptr<const LatentFactors> factors(const LayerConfig& layer) {
  auto f = std::make_shared<LatentFactors>();
  for (auto& [heads, rank] : {std::pair(&f->key, layer.key_rank), std::pair(&f->value, layer.value_rank)})
    heads->assign(kKvHeads, {0, rank, std::vector<float>(static_cast<size_t>(rank * kHeadDim), 0.1f)});
  return f;
}

void use(const Plan& plan) {
  ModelShape shape;
  shape.layers.assign(plan.layers.size(), {2, kKvHeads, kHeadDim, 0, 0.2f, 0});
  if (shape.layers.size() > 1) shape.layers[1].sliding_window = 200;
  check_plan(plan, shape, true);
  CacheConfig config = cache_config(plan, shape);
  config.max_bytes = size_t{64} << 20;
  for (LayerConfig& layer : config.layers) {
    if (layer.latent()) layer.factors = factors(layer);
  }
  if (predict_bytes(config, 1000) == 0) throw std::logic_error("a cache without bytes");
  if (plan.layers.size() > kMostLayers) return;
  Cache cache(config);
  const SequenceId id = cache.create();
  std::mt19937 random(1);
  const int tokens = is_chosen(to_json(plan)) ? 300 : 1;
  testing::Rows rows = testing::random_rows(cache.config().layers[0], tokens, random);
  testing::step(cache, {{id, tokens}}, rows);
  cache.remove(id);
}

bool accepts(const std::string& input) {
  try {
    const Plan plan = parse_plan(input, "plan");
    const std::string text = to_json(plan);
    if (to_json(parse_plan(text, "written")) != text) throw std::logic_error("a plan is not read as it was written");
    use(plan);
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<fuzz::Seed> seeds() {
  Plan plan;
  plan.model = plan.fingerprint = "m";
  plan.planner = "by hand";
  plan.predicted = Plan::Prediction{"kl", 0.5};
  plan.local_sinks = 0;
  plan.window.tokens = 64;
  plan.recent = testing::kRecents.back();
  plan.layers.resize(2);
  plan.layers[0].key.codec = testing::key_codec(3);
  plan.layers[0].key.transform.hadamard = true;
  plan.layers[0].key.transform.scales.assign(kKvHeads * kHeadDim, 1.5f);
  plan.layers[0].key.transform.feedback.assign(kKvHeads * kHeadDim * (kHeadDim - 1) / 2, 0.125f);
  plan.layers[0].value.codec = testing::value_codec(2);
  Plan dropping;
  dropping.model = dropping.fingerprint = "m";
  dropping.planner = "by hand";
  dropping.tokens = PolicySpec{"snapkv", {{"keep", 0.25}}};
  dropping.window.ratio_key = dropping.window.ratio_value = 0;
  dropping.layers.resize(1);
  dropping.layers[0].key.codec = testing::key_codec(2, 32);
  Plan centred = dropping;
  centred.tokens.reset();
  centred.window.ratio_key = 0.2f;
  centred.layers[0].key.transform.center.assign(kKvHeads * kHeadDim, 0.25f);
  Plan thin = centred;
  thin.channels = PolicySpec{"think", {{"keep", 0.5}, {"window", 16.0}}};
  Plan latent;
  latent.model = latent.fingerprint = "m";
  latent.planner = "by hand";
  latent.rank = RankSpec{"factors.gguf", "1", "palu"};
  latent.layers.resize(2);
  latent.layers[0].key.codec = testing::key_codec(4, 32);
  for (Plan::Layer& layer : latent.layers) layer.key_rank = layer.value_rank = kKvHeads * kHeadDim;  // the least is all of them
  return {fuzz::whole(to_json(plan)), fuzz::whole(to_json(dropping)), fuzz::whole(to_json(centred)), fuzz::whole(to_json(thin)),
          fuzz::whole(to_json(latent))};
}

const fuzz::Registered registered({"plan", seeds, accepts, 6000});

}  // namespace
}  // namespace kvmix
