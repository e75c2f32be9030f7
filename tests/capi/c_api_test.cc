// What the C ABI does, beside the C++ API it stands on.
#include <cmath>
#include <filesystem>
#include <fstream>

#include "capi/fixture.h"
#include "kvmix/cache.h"
#include "kvmix/error.h"
#include "kvmix/plan.h"

namespace kvmix::testing {
namespace {

TEST(CApi, DoesWhatTheClassDoes) {
  for (const char* recent : {"f16", "int8.token.g64.minmax.zero"}) {
    kvmix_layer_config l = c_layer();
    l.recent_codec = recent;
    const CachePointer owner = c_cache(l);
    kvmix_cache* cache = owner.get();
    kvmix_sequence a = -1, b = -1, loaded = -1;
    ASSERT_EQ(kvmix_sequence_create(cache, &a), KVMIX_OK);
    run(cache, a, 500, 1);
    ASSERT_EQ(kvmix_sequence_fork(cache, a, &b), KVMIX_OK);
    const std::string path = ::testing::TempDir() + "/kvmix_c_api";
    ASSERT_EQ(kvmix_sequence_save(cache, a, path.c_str(), "f"), KVMIX_OK) << kvmix_last_error();
    ASSERT_EQ(kvmix_sequence_load(cache, path.c_str(), "f", &loaded), KVMIX_OK) << kvmix_last_error();
    EXPECT_EQ(kvmix_sequence_load(cache, path.c_str(), "g", &loaded), KVMIX_MISMATCH);
    std::filesystem::remove(path);
    const auto from_a = run(cache, a, 1, 9);
    EXPECT_EQ(run(cache, b, 1, 9), from_a);
    EXPECT_EQ(run(cache, loaded, 1, 9), from_a);
    for (const float x : from_a) EXPECT_TRUE(std::isfinite(x));

    int64_t n = 0;
    ASSERT_EQ(kvmix_sequence_truncate(cache, b, 100), KVMIX_OK);
    ASSERT_EQ(kvmix_sequence_length(cache, b, &n), KVMIX_OK);
    EXPECT_EQ(n, 100);
    kvmix_memory m = {};
    m.struct_bytes = sizeof m;
    ASSERT_EQ(kvmix_cache_memory(cache, &m), KVMIX_OK);
    EXPECT_EQ(m.total_bytes, m.sealed_bytes + m.open_bytes + m.sink_bytes + m.table_bytes + m.slack_bytes);
    EXPECT_EQ(m.tokens, 501 + 100 + 501);
    const char* kernel = nullptr;
    ASSERT_EQ(kvmix_cache_kernel(cache, &kernel), KVMIX_OK);
    EXPECT_STRNE(kernel, "");
    for (const kvmix_sequence id : {a, b, loaded}) EXPECT_EQ(kvmix_sequence_remove(cache, id), KVMIX_OK);
  }
}

TEST(CApi, TailAndPredictionAreThoseOfTheCache) {
  const CachePointer owner = c_cache(c_layer());
  kvmix_sequence id = -1;
  ASSERT_EQ(kvmix_sequence_create(owner.get(), &id), KVMIX_OK);
  for (const int n : {144, 128, 128, 100}) run(owner.get(), id, n, 1);  // chunks that end with pages
  kvmix_tail tail = {sizeof tail, -1, -1, -1};
  ASSERT_EQ(kvmix_sequence_tail(owner.get(), id, 0, &tail), KVMIX_OK);
  EXPECT_EQ(tail.sinks, 16);
  EXPECT_EQ(tail.sealed, 2 * kPageTokens);
  EXPECT_EQ(tail.recent, 500 - 16 - 2 * kPageTokens);

  size_t predicted = 0;
  ASSERT_EQ(kvmix_cache_predict_bytes(owner.get(), 500, &predicted), KVMIX_OK);
  kvmix_memory m = {};
  m.struct_bytes = sizeof m;
  ASSERT_EQ(kvmix_cache_memory(owner.get(), &m), KVMIX_OK);
  EXPECT_EQ(m.total_bytes - m.slack_bytes, predicted);
  ASSERT_EQ(kvmix_cache_predict_bytes(owner.get(), 0, &predicted), KVMIX_OK);
  EXPECT_LT(predicted, m.total_bytes);
}

TEST(CApi, StatusesAreThoseOfTheLibrary) {
  for (int s = KVMIX_OK; s <= KVMIX_INTERNAL; ++s) {
    EXPECT_STREQ(kvmix_status_name(static_cast<kvmix_status>(s)), status_name(static_cast<Status>(s)));
  }
  EXPECT_EQ(static_cast<int>(Status::kInternal), KVMIX_INTERNAL);
}

TEST(CApi, VersionIsTheSameInWordsAndAsANumber) {
  int major = -1, minor = -1, patch = -1;
  ASSERT_EQ(std::sscanf(kvmix_version(), "%d.%d.%d", &major, &minor, &patch), 3) << kvmix_version();
  EXPECT_EQ(kvmix_version_number(), major * 10000 + minor * 100 + patch);
}

// Two layers, one of them with a sliding window, whose plan uses every kind of transform.
struct Planned {
  ModelShape model;
  Plan plan;
  std::vector<kvmix_model_layer> layers;
  kvmix_model_shape shape = {};

  Planned() {
    model.name = "two layers";
    model.fingerprint = "0123456789abcdef";
    model.layers = {
        {.q_heads = kHeads, .kv_heads = kKvHeads, .head_dim = kDim, .sliding_window = 0, .scale = 0.125f, .softcap = 0},
        {.q_heads = kHeads, .kv_heads = kKvHeads, .head_dim = kDim, .sliding_window = 200, .scale = 0.1f, .softcap = 30}};
    plan.fingerprint = model.fingerprint;
    plan.model = model.name;
    plan.planner = "test";
    plan.note = "every transform";
    plan.sinks = 16;
    plan.local_sinks = 0;
    plan.window.tokens = 64;
    plan.recent = parse_codec("int8.token.g64.minmax.zero");
    plan.layers.resize(2);
    SideConfig &key = plan.layers[0].key, &value = plan.layers[0].value;
    key.codec = parse_codec("int3.channel.g128.fitted.zero");
    value.codec = parse_codec("int2.token.g64.minmax.zero");
    for (SideConfig* side : {&key, &value}) {
      side->transform.hadamard = true;
      side->transform.scales.assign(kKvHeads * kDim, 0.75f);  // a number that fp16 holds
      side->transform.feedback.assign(kKvHeads * kDim * (kDim - 1) / 2, 0.015625f);
    }
    key.transform.center.assign(kKvHeads * kDim, 0.5f);
    SideConfig &local_key = plan.layers[1].key, &local_value = plan.layers[1].value;
    local_key.codec = parse_codec("int4.channel.g64.minmax.zero");
    local_value.codec = parse_codec("int4.token.g32.minmax.sym");
    local_key.transform.matrix.assign(kKvHeads * kDim * kDim, 0.0f);
    for (size_t i = 0; i < kKvHeads * kDim; ++i) local_key.transform.matrix[i * kDim + (i + 1) % kDim] = 1.0f;  // a rotation
    local_key.transform.matrix_inverse.assign(local_key.transform.matrix.size(), 0.0f);
    for (size_t i = 0; i < kKvHeads * kDim; ++i) {
      local_key.transform.matrix_inverse[(i / kDim * kDim + (i + 1) % kDim) * kDim + i % kDim] = 1.0f;
    }
    for (const ModelShape::Layer& l : model.layers) {
      layers.push_back({sizeof(kvmix_model_layer), l.q_heads, l.kv_heads, l.head_dim, l.sliding_window, l.scale, l.softcap});
    }
    shape = {sizeof shape, model.name.c_str(), model.fingerprint.c_str(), layers.data(), layers.size()};
  }

  kvmix_status create(kvmix_cache** cache, const std::string& json) const {
    kvmix_plan* c_plan = nullptr;
    EXPECT_EQ(kvmix_plan_parse(json.c_str(), &c_plan), KVMIX_OK) << kvmix_last_error();
    const kvmix_status status = kvmix_cache_create_from_plan(c_plan, &shape, nullptr, cache);
    kvmix_plan_destroy(c_plan);
    return status;
  }
};

TEST(CApiPlan, IsTheCacheOfTheClassToTheBit) {
  const Planned planned;
  const std::string path = ::testing::TempDir() + "/kvmix_c_api_plan.json";
  write_plan(planned.plan, path);
  kvmix_plan* c_plan = nullptr;
  ASSERT_EQ(kvmix_plan_read(path.c_str(), &c_plan), KVMIX_OK) << kvmix_last_error();
  std::filesystem::remove(path);
  kvmix_cache *from_file = nullptr, *from_text = nullptr;
  ASSERT_EQ(kvmix_cache_create_from_plan(c_plan, &planned.shape, nullptr, &from_file), KVMIX_OK) << kvmix_last_error();
  kvmix_plan_destroy(c_plan);
  const CachePointer file_owner(from_file);
  ASSERT_EQ(planned.create(&from_text, to_json(planned.plan)), KVMIX_OK) << kvmix_last_error();
  const CachePointer text_owner(from_text);

  // What the file holds, not what was written: some numbers are stored as fp16.
  Cache cache(cache_config(parse_plan(to_json(planned.plan), "plan"), planned.model));
  const SequenceId id = cache.create();
  kvmix_sequence a = -1, b = -1;
  ASSERT_EQ(kvmix_sequence_create(from_file, &a), KVMIX_OK);
  ASSERT_EQ(kvmix_sequence_create(from_text, &b), KVMIX_OK);
  for (unsigned i = 0; i < 12; ++i) {
    const int n = i < 6 ? 128 : 1;
    StepRows rows(n, i);
    const std::vector<StepItem> items = {{id, n}};
    cache.begin_step(items);
    for (int l = 0; l < 2; ++l) {
      cache.append(l, rows.k.data(), rows.kKvRow, rows.v.data(), rows.kKvRow, 0, 1);
      cache.attend(l, rows.q.data(), rows.kQRow, rows.out.data(), rows.kQRow, 0, 1);
    }
    cache.end_step();
    EXPECT_EQ(run(from_file, a, n, i, 2), rows.out) << "step " << i;
    EXPECT_EQ(run(from_text, b, n, i, 2), rows.out) << "step " << i;
  }
  const std::string saved = ::testing::TempDir() + "/kvmix_c_api_saved";
  const auto bytes = [&] {
    std::ifstream file(saved, std::ios::binary);
    std::string all((std::istreambuf_iterator<char>(file)), {});
    std::filesystem::remove(saved);
    return all;
  };
  cache.save(id, saved, "f");
  const std::string expected = bytes();
  ASSERT_EQ(kvmix_sequence_save(from_file, a, saved.c_str(), "f"), KVMIX_OK);
  EXPECT_EQ(bytes(), expected);
  size_t predicted = 0;
  ASSERT_EQ(kvmix_cache_predict_bytes(from_file, 774, &predicted), KVMIX_OK);
  EXPECT_EQ(predicted, predict_bytes(cache.config(), 774));
}

// A plan's token policy acts where a prompt's last chunk ends; a header without the fields means whole prompts.
TEST(CApiPlan, TokenPoliciesActOnPrompts) {
  Planned planned;
  planned.plan.tokens = PolicySpec{"streaming", {{"tokens", 100.0}}};
  kvmix_cache* cache = nullptr;
  ASSERT_EQ(planned.create(&cache, to_json(planned.plan)), KVMIX_OK) << kvmix_last_error();
  const CachePointer owner(cache);
  kvmix_sequence id = -1, whole = -1;
  ASSERT_EQ(kvmix_sequence_create(cache, &id), KVMIX_OK);
  ASSERT_EQ(kvmix_sequence_create(cache, &whole), KVMIX_OK);
  const auto feed = [&](kvmix_sequence to, int n, int32_t more, int32_t decoded, size_t struct_bytes) {
    StepRows rows(n, 1);
    const kvmix_step_item item = {struct_bytes, to, n, more, decoded};
    EXPECT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OK) << kvmix_last_error();
    for (int l = 0; l < 2; ++l) {
      EXPECT_EQ(kvmix_cache_append(cache, l, rows.k.data(), rows.kKvRow, rows.v.data(), rows.kKvRow, 0, 1), KVMIX_OK);
      EXPECT_EQ(kvmix_cache_attend(cache, l, rows.q.data(), rows.kQRow, rows.out.data(), rows.kQRow, 0, 1), KVMIX_OK);
    }
    EXPECT_EQ(kvmix_step_end(cache), KVMIX_OK) << kvmix_last_error();
  };
  size_t count = 0;
  const auto kept = [&](kvmix_sequence of) {
    EXPECT_EQ(kvmix_sequence_kept(cache, of, 0, 1, nullptr, 0, &count), KVMIX_OK) << kvmix_last_error();
    return count;
  };
  feed(id, 150, 1, 0, sizeof(kvmix_step_item));
  EXPECT_EQ(kept(id), 150u);
  feed(id, 150, 0, 0, sizeof(kvmix_step_item));
  EXPECT_EQ(kept(id), 100u);
  feed(id, 5, 0, 1, sizeof(kvmix_step_item));
  EXPECT_EQ(kept(id), 105u);
  // An older header's item; what stands behind it is not read.
  feed(whole, 300, -1, -1, offsetof(kvmix_step_item, more));
  EXPECT_EQ(kept(whole), 100u);
  std::vector<int64_t> positions(6, -1);
  ASSERT_EQ(kvmix_sequence_kept(cache, whole, 0, 0, positions.data(), 5, &count), KVMIX_OK);
  EXPECT_EQ(positions, (std::vector<int64_t>{0, 1, 2, 3, 204, -1}));
  EXPECT_EQ(kvmix_sequence_kept(cache, whole, 0, kKvHeads, nullptr, 0, &count), KVMIX_INVALID_ARGUMENT);
  EXPECT_NE(std::string(kvmix_last_error()).find("KV head 2"), std::string::npos);
}

TEST(CApiPlan, WhatDoesNotFitIsRefusedByName) {
  Planned planned;
  kvmix_cache* cache = nullptr;
  const auto refused = [&](kvmix_status status, const char* word) {
    EXPECT_EQ(planned.create(&cache, to_json(planned.plan)), status);
    EXPECT_NE(std::string(kvmix_last_error()).find(word), std::string::npos) << word << " in: " << kvmix_last_error();
    EXPECT_EQ(cache, nullptr);
  };
  planned.shape.fingerprint = "another";
  refused(KVMIX_MISMATCH, "another");
  planned.shape.fingerprint = nullptr;  // any plan that fits
  ASSERT_EQ(planned.create(&cache, to_json(planned.plan)), KVMIX_OK) << kvmix_last_error();
  kvmix_cache_destroy(cache);
  cache = nullptr;
  planned.shape.layer_count = 1;
  refused(KVMIX_MISMATCH, "layers");
  planned.shape.layer_count = 2;
  planned.layers[0].head_dim = 128;  // transforms of 64 channels
  refused(KVMIX_INVALID_ARGUMENT, "layer 0 keys");
  planned.layers[0].head_dim = 60;
  refused(KVMIX_INVALID_ARGUMENT, "60");
  planned.layers[0].head_dim = kDim;
  planned.layers[1].kv_heads = 3;
  refused(KVMIX_INVALID_ARGUMENT, "layer 1");
  planned.layers[1].kv_heads = kKvHeads;
  planned.shape.layers = nullptr;
  refused(KVMIX_INVALID_ARGUMENT, "kvmix_model_shape.layers");

  kvmix_plan* plan = nullptr;
  EXPECT_EQ(kvmix_plan_parse("{\"format\": \"kvmix-profile\"}", &plan), KVMIX_CORRUPT);
  EXPECT_NE(std::string(kvmix_last_error()).find("format"), std::string::npos);
  EXPECT_EQ(kvmix_plan_parse("a path?", &plan), KVMIX_CORRUPT);
  EXPECT_EQ(kvmix_plan_read("/nonexistent/plan.json", &plan), KVMIX_NOT_FOUND);
  EXPECT_EQ(plan, nullptr);
}

}  // namespace
}  // namespace kvmix::testing
