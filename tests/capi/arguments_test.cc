// Every function's bad arguments, and structs of other versions of the header.
#include <cstring>
#include <fstream>
#include <limits>
#include <set>

#include "capi/fixture.h"
#include "capi/guard.h"

namespace kvmix::testing {
namespace {

constexpr int kRow = kHeads * kDim, kKvRow = kKvHeads * kDim;

// Whether a call fails with this status and names the word.
void expect_refused(kvmix_status got, kvmix_status status, const std::string& word) {
  EXPECT_EQ(got, status) << word << ": " << kvmix_last_error();
  const std::string message = kvmix_last_error();
  EXPECT_NE(message.find(word), std::string::npos) << word << " in: " << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

TEST(CApiArguments, EveryFunctionRefusesNullByName) {
  const kvmix_layer_config layer = c_layer();
  const CachePointer owner = c_cache(layer);
  kvmix_cache *cache = owner.get(), *made = nullptr;
  kvmix_sequence id = -1;
  ASSERT_EQ(kvmix_sequence_create(cache, &id), KVMIX_OK);
  kvmix_sequence other = -1;
  kvmix_plan* plan = nullptr;
  const kvmix_model_shape shape = {sizeof shape, nullptr, nullptr, nullptr, 0};
  const kvmix_step_item item = {sizeof item, id, 1, 0, 0};
  kvmix_tail tail = {sizeof tail, 0, 0, 0};
  int64_t n = 0;
  size_t bytes = 0;
  const char* text = nullptr;
  float x[kRow] = {}, out[kRow];
  std::set<std::string> tried;
  const auto refused = [&](const std::string& function, kvmix_status status, const std::string& word) {
    SCOPED_TRACE(function);
    tried.insert(function);
    expect_refused(status, KVMIX_INVALID_ARGUMENT, word);
  };
  refused("kvmix_layer_defaults", kvmix_layer_defaults(nullptr), "layer is null");
  refused("kvmix_cache_create", kvmix_cache_create(nullptr, 1, nullptr, &made), "layers is null");
  refused("kvmix_cache_create", kvmix_cache_create(nullptr, 0, nullptr, &made), "no layers");
  refused("kvmix_cache_create", kvmix_cache_create(&layer, 1, nullptr, nullptr), "cache is null");
  refused("kvmix_plan_read", kvmix_plan_read(nullptr, &plan), "path is null");
  refused("kvmix_plan_read", kvmix_plan_read("x", nullptr), "plan is null");
  refused("kvmix_plan_parse", kvmix_plan_parse(nullptr, &plan), "json is null");
  refused("kvmix_plan_parse", kvmix_plan_parse("{}", nullptr), "plan is null");
  refused("kvmix_cache_create_from_plan", kvmix_cache_create_from_plan(nullptr, &shape, nullptr, &made), "plan is null");
  refused("kvmix_sequence_create", kvmix_sequence_create(nullptr, &other), "cache is null");
  refused("kvmix_sequence_create", kvmix_sequence_create(cache, nullptr), "sequence is null");
  refused("kvmix_sequence_remove", kvmix_sequence_remove(nullptr, id), "cache is null");
  refused("kvmix_sequence_fork", kvmix_sequence_fork(nullptr, id, &other), "cache is null");
  refused("kvmix_sequence_fork", kvmix_sequence_fork(cache, id, nullptr), "copy is null");
  refused("kvmix_sequence_truncate", kvmix_sequence_truncate(nullptr, id, 0), "cache is null");
  refused("kvmix_sequence_truncate", kvmix_sequence_truncate(cache, id, 1), "cannot truncate");
  refused("kvmix_sequence_truncate", kvmix_sequence_truncate(cache, id, -1), "cannot truncate");
  refused("kvmix_sequence_length", kvmix_sequence_length(nullptr, id, &n), "cache is null");
  refused("kvmix_sequence_length", kvmix_sequence_length(cache, id, nullptr), "n_tokens is null");
  refused("kvmix_sequence_save", kvmix_sequence_save(nullptr, id, "p", "f"), "cache is null");
  refused("kvmix_sequence_save", kvmix_sequence_save(cache, id, nullptr, "f"), "path is null");
  refused("kvmix_sequence_save", kvmix_sequence_save(cache, id, "p", nullptr), "fingerprint is null");
  refused("kvmix_sequence_load", kvmix_sequence_load(nullptr, "p", "f", &other), "cache is null");
  refused("kvmix_sequence_load", kvmix_sequence_load(cache, nullptr, "f", &other), "path is null");
  refused("kvmix_sequence_load", kvmix_sequence_load(cache, "p", nullptr, &other), "fingerprint is null");
  refused("kvmix_sequence_load", kvmix_sequence_load(cache, "p", "f", nullptr), "sequence is null");
  refused("kvmix_sequence_tail", kvmix_sequence_tail(nullptr, id, 0, &tail), "cache is null");
  refused("kvmix_sequence_tail", kvmix_sequence_tail(cache, id, 0, nullptr), "tail is null");
  refused("kvmix_sequence_tail", kvmix_sequence_tail(cache, id, -1, &tail), "layer -1");
  refused("kvmix_sequence_tail", kvmix_sequence_tail(cache, id, 1, &tail), "layer 1");
  size_t count = 0;
  refused("kvmix_sequence_kept", kvmix_sequence_kept(nullptr, id, 0, 0, nullptr, 0, &count), "cache is null");
  refused("kvmix_sequence_kept", kvmix_sequence_kept(cache, id, 0, 0, nullptr, 1, &count), "positions is null");
  refused("kvmix_sequence_kept", kvmix_sequence_kept(cache, id, 0, 0, nullptr, 0, nullptr), "count is null");
  refused("kvmix_sequence_kept", kvmix_sequence_kept(cache, id, 1, 0, nullptr, 0, &count), "layer 1");
  refused("kvmix_sequence_kept", kvmix_sequence_kept(cache, id, 0, -1, nullptr, 0, &count), "KV head -1");
  refused("kvmix_step_begin", kvmix_step_begin(nullptr, &item, 1), "cache is null");
  refused("kvmix_step_begin", kvmix_step_begin(cache, nullptr, 1), "items is null");
  refused("kvmix_step_begin", kvmix_step_begin(cache, &item, 0), "at least one");
  refused("kvmix_step_end", kvmix_step_end(nullptr), "cache is null");
  refused("kvmix_step_end", kvmix_step_end(cache), "no step");
  refused("kvmix_step_abort", kvmix_step_abort(nullptr), "cache is null");
  refused("kvmix_step_abort", kvmix_step_abort(cache), "no step");
  refused("kvmix_cache_append", kvmix_cache_append(nullptr, 0, x, kKvRow, x, kKvRow, 0, 1), "cache is null");
  refused("kvmix_cache_append", kvmix_cache_append(cache, 0, x, kKvRow, x, kKvRow, 0, 1), "no step");
  refused("kvmix_cache_attend", kvmix_cache_attend(nullptr, 0, x, kRow, out, kRow, 0, 1), "cache is null");
  refused("kvmix_cache_attend", kvmix_cache_attend(cache, 0, x, kRow, out, kRow, 0, 1), "no step");
  refused("kvmix_cache_memory", kvmix_cache_memory(nullptr, nullptr), "cache is null");
  refused("kvmix_cache_memory", kvmix_cache_memory(cache, nullptr), "memory is null");
  refused("kvmix_cache_predict_bytes", kvmix_cache_predict_bytes(nullptr, 1, &bytes), "cache is null");
  refused("kvmix_cache_predict_bytes", kvmix_cache_predict_bytes(cache, 1, nullptr), "bytes is null");
  refused("kvmix_cache_predict_bytes", kvmix_cache_predict_bytes(cache, -1, &bytes), "n_tokens is -1");
  refused("kvmix_cache_predict_bytes", kvmix_cache_predict_bytes(cache, std::numeric_limits<int64_t>::max(), &bytes),
          "n_tokens");
  refused("kvmix_cache_kernel", kvmix_cache_kernel(nullptr, &text), "cache is null");
  refused("kvmix_cache_kernel", kvmix_cache_kernel(cache, nullptr), "name is null");
  kvmix_cache_destroy(nullptr);
  kvmix_plan_destroy(nullptr);
  EXPECT_EQ(made, nullptr);
  EXPECT_EQ(plan, nullptr);

  // The header's functions that can fail are those tried here.
  std::ifstream file(KVMIX_SOURCE_DIR "/include/kvmix/kvmix.h");
  const std::string header((std::istreambuf_iterator<char>(file)), {});
  std::set<std::string> declared;
  const std::string before = "KVMIX_API kvmix_status ";
  for (size_t at = header.find(before); at != std::string::npos; at = header.find(before, at)) {
    at += before.size();
    declared.insert(header.substr(at, header.find('(', at) - at));
  }
  EXPECT_EQ(tried, declared);
}

TEST(CApiArguments, ValuesThatCannotBeAreNamed) {
  kvmix_cache* cache = nullptr;
  const auto create = [&](const auto& change, const char* word) {
    kvmix_layer_config l = c_layer();
    kvmix_cache_options options = c_options();
    change(l, options);
    expect_refused(kvmix_cache_create(&l, 1, &options, &cache), KVMIX_INVALID_ARGUMENT, word);
  };
  using Layer = kvmix_layer_config;
  using Options = kvmix_cache_options;
  create([](Layer& l, Options&) { l.key_codec = "int9"; }, "int9");
  create([](Layer& l, Options&) { l.key_codec = nullptr; }, "key_codec is null");
  create([](Layer& l, Options&) { l.value_codec = nullptr; }, "value_codec is null");
  create([](Layer& l, Options&) { l.recent_codec = "int8.channel.g64.minmax.zero"; }, "recent");
  create([](Layer& l, Options&) { l.q_heads = 3; }, "3 query heads");
  create([](Layer& l, Options&) { l.kv_heads = 0; }, "0 KV heads");
  create([](Layer& l, Options&) { l.head_dim = 0; }, "0");
  create([](Layer& l, Options&) { l.scale = -1; }, "scale");
  create([](Layer& l, Options&) { l.softcap = -1; }, "softcap");
  create([](Layer& l, Options&) { l.sliding_window = -1; }, "sliding_window");
  create([](Layer& l, Options&) { l.sinks = -1; }, "sinks");
  create([](Layer& l, Options&) { l.window = -1; }, "window");
  create([](Layer&, Options& o) { o.threads = 257; }, "257");
  create([](Layer&, Options& o) { o.threads = -1; }, "-1");
  create([](Layer&, Options& o) { o.kernel = "avx9"; }, "avx9");
  create([](Layer&, Options& o) { o.device = "abacus"; }, "abacus");
  create([](Layer&, Options& o) { o.device_rows = 1; }, "device memory");
  create([](Layer&, Options& o) { o.stream = &o; }, "stream");
  create([](Layer&, Options& o) { o.reserved = 1; }, "reserved");
  create([](Layer&, Options& o) { o.device = "cuda", o.kernel = "portable"; }, "portable");
  EXPECT_EQ(cache, nullptr);
}

TEST(CApiArguments, StepsAreChecked) {
  kvmix_layer_config l = c_layer();
  kvmix_cache_options options = c_options();
  options.max_bytes = 1 << 20;
  kvmix_cache* cache = nullptr;
  ASSERT_EQ(kvmix_cache_create(&l, 1, &options, &cache), KVMIX_OK);
  const CachePointer owner(cache);
  kvmix_sequence id = -1;
  ASSERT_EQ(kvmix_sequence_create(cache, &id), KVMIX_OK);
  const float x[kRow] = {};
  float out[kRow];
  kvmix_step_item item = {sizeof item, id, 1000000, 0, 0};
  EXPECT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OUT_OF_MEMORY);
  EXPECT_EQ(kvmix_step_end(cache), KVMIX_INVALID_ARGUMENT);
  item.n_tokens = 0;
  expect_refused(kvmix_step_begin(cache, &item, 1), KVMIX_INVALID_ARGUMENT, "0 tokens");
  item = {sizeof item, 77, 1, 0, 0};
  EXPECT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_NOT_FOUND);
  const kvmix_step_item twice[2] = {{sizeof item, id, 1, 0, 0}, {sizeof item, id, 1, 0, 0}};
  expect_refused(kvmix_step_begin(cache, twice, 2), KVMIX_INVALID_ARGUMENT, "twice");
  item = {sizeof item, id, 1, 0, 0};
  ASSERT_EQ(kvmix_step_begin(cache, &item, 1), KVMIX_OK);
  expect_refused(kvmix_step_begin(cache, &item, 1), KVMIX_INVALID_ARGUMENT, "already open");
  const auto append = [&](int layer, const float* k, int64_t k_stride, const float* v, int64_t v_stride, int ith, int nth) {
    return kvmix_cache_append(cache, layer, k, k_stride, v, v_stride, ith, nth);
  };
  const auto refused = [](kvmix_status status, const char* word) { expect_refused(status, KVMIX_INVALID_ARGUMENT, word); };
  refused(append(1, x, kKvRow, x, kKvRow, 0, 1), "layer 1");
  refused(append(-1, x, kKvRow, x, kKvRow, 0, 1), "layer -1");
  refused(append(0, x, kKvRow, x, kKvRow, 0, 2), "thread 0 of 2");
  refused(append(0, x, kKvRow, x, kKvRow, 1, 1), "thread 1 of 1");
  refused(append(0, x, kKvRow, x, kKvRow, -1, 1), "thread -1");
  refused(append(0, nullptr, kKvRow, x, kKvRow, 0, 1), "k is null");
  refused(append(0, x, kKvRow, nullptr, kKvRow, 0, 1), "v is null");
  refused(append(0, x, kKvRow - 1, x, kKvRow, 0, 1), "k_stride");
  refused(append(0, x, kKvRow, x, -kKvRow, 0, 1), "v_stride");
  refused(kvmix_cache_attend(cache, 0, nullptr, kRow, out, kRow, 0, 1), "q is null");
  refused(kvmix_cache_attend(cache, 0, x, kRow, nullptr, kRow, 0, 1), "out is null");
  refused(kvmix_cache_attend(cache, 0, x, kKvRow, out, kRow, 0, 1), "q_stride");
  refused(kvmix_cache_attend(cache, 0, x, kRow, out, 0, 0, 1), "out_stride");
  refused(kvmix_sequence_remove(cache, id), "inside a step");
  EXPECT_EQ(kvmix_step_abort(cache), KVMIX_OK);
  EXPECT_EQ(kvmix_sequence_remove(cache, 77), KVMIX_NOT_FOUND);
  EXPECT_EQ(kvmix_sequence_load(cache, "/nonexistent/file", "f", &id), KVMIX_NOT_FOUND);
}

// A caller's struct: a header's fields, then what a later header would have behind them.
template <typename T>
struct Later {
  T known;
  uint64_t field;
};

TEST(CApiStructs, OlderLayoutsTakeDefaults) {
  // What is behind struct_bytes is not the struct's and must not be read.
  kvmix_layer_config l = c_layer();
  l.struct_bytes = offsetof(kvmix_layer_config, sinks);
  l.sinks = -5;
  l.key_codec = "nonsense";
  kvmix_cache_options options = c_options();
  options.struct_bytes = sizeof(size_t);
  options.threads = -7;
  kvmix_cache* cache = nullptr;
  ASSERT_EQ(kvmix_cache_create(&l, 1, &options, &cache), KVMIX_OK) << kvmix_last_error();
  const CachePointer owner(cache), same = c_cache(c_layer());
  kvmix_sequence a = -1, b = -1;
  ASSERT_EQ(kvmix_sequence_create(cache, &a), KVMIX_OK);
  ASSERT_EQ(kvmix_sequence_create(same.get(), &b), KVMIX_OK);
  EXPECT_EQ(run(cache, a, 300, 1), run(same.get(), b, 300, 1));
  EXPECT_EQ(run(cache, a, 1, 2), run(same.get(), b, 1, 2));

  kvmix_layer_config defaults = {};
  defaults.struct_bytes = offsetof(kvmix_layer_config, recent_codec);
  defaults.key_codec = "untouched";
  ASSERT_EQ(kvmix_layer_defaults(&defaults), KVMIX_OK);
  EXPECT_EQ(defaults.struct_bytes, offsetof(kvmix_layer_config, recent_codec));
  EXPECT_EQ(defaults.sinks, 16);
  EXPECT_STREQ(defaults.key_codec, "untouched");
}

TEST(CApiStructs, LaterLayoutsGoIfTheirFieldsAreZero) {
  Later<kvmix_layer_config> layers[2] = {{c_layer(), 0}, {c_layer(), 0}};
  for (auto& l : layers) l.known.struct_bytes = sizeof l;
  Later<kvmix_cache_options> options = {c_options(), 0};
  options.known.struct_bytes = sizeof options;
  kvmix_cache* cache = nullptr;
  ASSERT_EQ(kvmix_cache_create(&layers[0].known, 2, &options.known, &cache), KVMIX_OK) << kvmix_last_error();
  const CachePointer owner(cache);
  kvmix_sequence id = -1;
  ASSERT_EQ(kvmix_sequence_create(cache, &id), KVMIX_OK);
  run(cache, id, 10, 1, 2);  // both layers were read
  Later<kvmix_memory> memory = {{}, 99};
  memory.known.struct_bytes = sizeof memory;
  ASSERT_EQ(kvmix_cache_memory(cache, &memory.known), KVMIX_OK);
  EXPECT_EQ(memory.known.tokens, 10);
  EXPECT_EQ(memory.known.struct_bytes, sizeof memory);
  EXPECT_EQ(memory.field, 0u);

  kvmix_cache* none = nullptr;
  layers[1].field = 1;
  expect_refused(kvmix_cache_create(&layers[0].known, 2, nullptr, &none), KVMIX_UNSUPPORTED, "kvmix_layer_config has 80 bytes");
  options.field = 1;
  layers[1].field = 0;
  expect_refused(kvmix_cache_create(&layers[0].known, 2, &options.known, &none), KVMIX_UNSUPPORTED, "kvmix_cache_options");
  layers[1].known.struct_bytes = sizeof(kvmix_layer_config);
  options.field = 0;
  expect_refused(kvmix_cache_create(&layers[0].known, 2, nullptr, &none), KVMIX_INVALID_ARGUMENT, "kvmix_layer_config 1");
  EXPECT_EQ(none, nullptr);
}

TEST(CApiStructs, SizesThatCannotBeAreNamed) {
  const CachePointer owner = c_cache(c_layer());
  kvmix_sequence id = -1;
  ASSERT_EQ(kvmix_sequence_create(owner.get(), &id), KVMIX_OK);
  kvmix_plan* plan = nullptr;
  const char* text =
      R"({"format": "kvmix-plan", "version": 1, "model": "m", "fingerprint": "f", "planner": "p", "note": "n", "sinks": 0,
          "window": {"tokens": 0, "ratio_key": 0, "ratio_value": 0}, "layers": [{"key": {"bits": 16}, "value": {"bits": 16}}]})";
  ASSERT_EQ(kvmix_plan_parse(text, &plan), KVMIX_OK) << kvmix_last_error();
  kvmix_cache* made = nullptr;
  // 0 and a field's half; beyond any struct; and, of a later version, not a whole number of its fields.
  for (const size_t bytes : {size_t{0}, size_t{12}, size_t{81}, size_t{1} << 20}) {
    SCOPED_TRACE(bytes);
    const auto refused = [](kvmix_status status, const char* word) {
      expect_refused(status, KVMIX_INVALID_ARGUMENT, std::string(word) + ".struct_bytes is ");
    };
    kvmix_layer_config l = c_layer();
    l.struct_bytes = bytes;
    refused(kvmix_cache_create(&l, 1, nullptr, &made), "kvmix_layer_config");
    refused(kvmix_layer_defaults(&l), "kvmix_layer_config");
    l = c_layer();
    kvmix_cache_options options = c_options();
    options.struct_bytes = bytes;
    refused(kvmix_cache_create(&l, 1, &options, &made), "kvmix_cache_options");
    kvmix_model_layer layer = {sizeof layer, 4, 2, 64, 0, 0, 0};
    kvmix_model_shape shape = {bytes, nullptr, nullptr, &layer, 1};
    refused(kvmix_cache_create_from_plan(plan, &shape, nullptr, &made), "kvmix_model_shape");
    shape.struct_bytes = sizeof shape;
    layer.struct_bytes = bytes;
    refused(kvmix_cache_create_from_plan(plan, &shape, nullptr, &made), "kvmix_model_layer");
    layer.struct_bytes = sizeof layer;
    refused(kvmix_cache_create_from_plan(plan, &shape, &options, &made), "kvmix_cache_options");
    kvmix_step_item item = {bytes, id, 1, 0, 0};
    refused(kvmix_step_begin(owner.get(), &item, 1), "kvmix_step_item");
    kvmix_memory memory = {};
    memory.struct_bytes = bytes;
    refused(kvmix_cache_memory(owner.get(), &memory), "kvmix_memory");
    kvmix_tail tail = {bytes, 0, 0, 0};
    refused(kvmix_sequence_tail(owner.get(), id, 0, &tail), "kvmix_tail");
  }
  const kvmix_model_shape shape = {sizeof shape, nullptr, nullptr, nullptr, 0};
  expect_refused(kvmix_cache_create_from_plan(plan, nullptr, nullptr, &made), KVMIX_INVALID_ARGUMENT, "model is null");
  expect_refused(kvmix_cache_create_from_plan(plan, &shape, nullptr, nullptr), KVMIX_INVALID_ARGUMENT, "cache is null");
  EXPECT_EQ(made, nullptr);
  kvmix_plan_destroy(plan);
}

TEST(CApiGuard, CatchesEverything) {
  std::string message;
  EXPECT_EQ(run_guarded(message, [] { throw Error(Status::kMismatch, "a mismatch"); }), KVMIX_MISMATCH);
  EXPECT_EQ(message, "a mismatch");
  EXPECT_EQ(run_guarded(message, [] { throw std::bad_alloc(); }), KVMIX_OUT_OF_MEMORY);
  EXPECT_EQ(run_guarded(message, [] { throw std::length_error("too long"); }), KVMIX_INTERNAL);
  EXPECT_EQ(message, "too long");
  EXPECT_EQ(run_guarded(message, [] { throw 42; }), KVMIX_INTERNAL);
  EXPECT_NE(message.find("not a std::exception"), std::string::npos);
  EXPECT_EQ(run_guarded(message, [] {}), KVMIX_OK);
}

}  // namespace
}  // namespace kvmix::testing
