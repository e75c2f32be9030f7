#include "score/layerwise.h"

#include <ggml-alloc.h>
#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/parallel.h"
#include "cache/layout.h"
#include "engine/graph_device.h"
#include "kvmix/error.h"
#include "score/stored_page.h"

namespace kvmix {
namespace {

constexpr size_t kGraphNodes = 8192;
constexpr int64_t kMostQueries = 256;            // of a block
constexpr int64_t kHalfHead = int64_t{1} << 26;  // output heads of more elements are kept in fp16

// Queries of a block read the same sealed pages.
struct Block {
  int64_t begin, end, sealed;  // query rows; keys before `sealed` come from pages
};

std::vector<Block> query_blocks(const LayerConfig& layer, int64_t n) {
  const auto sealed_end = [&](int64_t t) {
    const int64_t pages = fixed_seal_target(layer, t);
    return pages == 0 ? 0 : layer.sinks + pages * kPageTokens;
  };
  std::vector<Block> blocks;
  for (int64_t t = 0; t < n;) {
    Block b{t, t, sealed_end(t)};
    while (b.end < n && b.end - b.begin < kMostQueries && sealed_end(b.end) == b.sealed) ++b.end;
    t = b.end;
    blocks.push_back(b);
  }
  return blocks;
}

struct StoredCall {
  LayerConfig config;
  Side side;
  const SideConfig& side_config() const { return side == Side::kKey ? config.key : config.value; }
  const CodecSpec& codec() const { return side_config().codec; }
};

// Rows [n][kv_heads][head_dim] as a side of a layer reads them: those that fill a page behind the sinks from that page, the
// others as they are. Pages are shared over `nth` callers.
void stored_rows(const LayerConfig& layer, Side side, int64_t n, const float* rows, float* out, int ith, int nth) {
  const int64_t stride = int64_t{layer.kv_heads} * layer.head_dim;
  const int64_t pages = n <= layer.sinks ? 0 : (n - layer.sinks) / kPageTokens;
  const int64_t paged = pages == 0 ? 0 : layer.sinks + pages * kPageTokens;
  if (ith == 0) {
    const int64_t head = pages == 0 ? n : layer.sinks;
    std::copy_n(rows, head * stride, out);
    if (pages > 0) std::copy_n(rows + paged * stride, (n - paged) * stride, out + paged * stride);
  }
  StoredPage page(side == Side::kKey ? layer.key : layer.value, layer.recent, row_shape(layer, side));
  for (int64_t unit = ith; unit < pages * layer.kv_heads; unit += nth) {
    const int64_t kv_head = unit % layer.kv_heads;
    const int64_t base = (layer.sinks + unit / layer.kv_heads * kPageTokens) * stride + kv_head * layer.head_dim;
    page.read_sealed(static_cast<int>(kv_head), stride, rows + base, out + base);
  }
}

// The same rows before they are sealed: all behind the sinks from the recent ones' codec.
void recent_rows(const LayerConfig& layer, Side side, int64_t n, const float* rows, float* out, int ith, int nth) {
  const int64_t stride = int64_t{layer.kv_heads} * layer.head_dim;
  const int64_t sinks = std::min<int64_t>(n, layer.sinks);
  if (ith == 0) std::copy_n(rows, sinks * stride, out);
  StoredPage page(side == Side::kKey ? layer.key : layer.value, layer.recent, row_shape(layer, side));
  for (int64_t unit = ith; sinks + unit / layer.kv_heads * kPageTokens < n; unit += nth) {
    const int64_t first = sinks + unit / layer.kv_heads * kPageTokens, kv_head = unit % layer.kv_heads;
    const int64_t base = first * stride + kv_head * layer.head_dim;
    page.read_recent(static_cast<int>(kv_head), std::min<int64_t>(kPageTokens, n - first), stride, rows + base, out + base);
  }
}

void recent_op(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& call = *static_cast<const StoredCall*>(data);
  const ggml_tensor* rows = out->src[0];
  recent_rows(call.config, call.side, rows->ne[2], static_cast<const float*>(rows->data), static_cast<float*>(out->data), ith,
              nth);
}

void stored_op(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& call = *static_cast<const StoredCall*>(data);
  const ggml_tensor* rows = out->src[0];
  stored_rows(call.config, call.side, rows->ne[2], static_cast<const float*>(rows->data), static_cast<float*>(out->data), ith,
              nth);
}

ggml_tensor* heads_outside(ggml_context* ctx, ggml_tensor* t) { return ggml_cont(ctx, ggml_permute(ctx, t, 0, 2, 1, 3)); }

// Attention by blocks of queries over sinks and what recent and sealed pages give back.
class BlockAttention final : public GraphHooks {
 public:
  BlockAttention(const LayerConfig& config, std::vector<ggml_tensor*>& masks)
      : masks_(masks), config_(config), key_{config, Side::kKey}, value_{config, Side::kValue} {}

  ggml_tensor* attention(ggml_context* ctx, int64_t, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) override {
    const int64_t dim = q->ne[0], heads = q->ne[1], n = q->ne[2], kv_heads = k->ne[1], group = heads / kv_heads;
    ggml_tensor* stored_k = stored(ctx, k, key_);
    ggml_tensor* stored_v = stored(ctx, v, value_);
    k = recent(ctx, k, key_);
    v = recent(ctx, v, value_);
    ggml_tensor* qh = heads_outside(ctx, q);
    ggml_tensor* kh = heads_outside(ctx, k);
    ggml_tensor* ksh = stored_k == k ? kh : heads_outside(ctx, stored_k);
    const auto tokens_inside = [&](ggml_tensor* t) { return ggml_cont(ctx, ggml_permute(ctx, t, 1, 2, 0, 3)); };
    ggml_tensor* vt = tokens_inside(v);  // [n, head_dim, kv_heads]
    ggml_tensor* vst = stored_v == v ? vt : tokens_inside(stored_v);

    blocks = query_blocks(config_, n);
    ggml_tensor* out = nullptr;
    for (const Block& b : blocks) {
      const int64_t queries = b.end - b.begin;
      const int64_t first = config_.sliding_window > 0 ? std::max<int64_t>(0, b.begin - config_.sliding_window + 1) : 0;
      const int64_t sealed = std::max(b.sealed, first);  // [first, sealed) from pages, [sealed, end) exact
      const auto key_rows = [&](ggml_tensor* t, int64_t from, int64_t to) {
        return ggml_view_3d(ctx, t, dim, to - from, kv_heads, t->nb[1], t->nb[2], static_cast<size_t>(from) * t->nb[1]);
      };
      const auto value_rows = [&](ggml_tensor* t, int64_t from, int64_t to) {
        return ggml_view_3d(ctx, t, to - from, dim, kv_heads, t->nb[1], t->nb[2], static_cast<size_t>(from) * t->nb[0]);
      };
      ggml_tensor* qb = ggml_cont(
          ctx, ggml_view_3d(ctx, qh, dim, queries, heads, qh->nb[1], qh->nb[2], static_cast<size_t>(b.begin) * qh->nb[1]));
      // Query heads of a group share a KV head: they are rows of one product.
      qb = ggml_reshape_3d(ctx, qb, dim, queries * group, kv_heads);
      ggml_tensor* s;
      if (sealed == first || ksh == kh) {
        s = ggml_mul_mat(ctx, key_rows(kh, first, b.end), qb);
      } else {
        s = ggml_concat(ctx, ggml_mul_mat(ctx, key_rows(ksh, first, sealed), qb),
                        ggml_mul_mat(ctx, key_rows(kh, sealed, b.end), qb), 0);
      }
      s = ggml_reshape_3d(ctx, s, b.end - first, queries, heads);
      ggml_tensor* mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, b.end - first, queries);
      ggml_set_input(mask);
      masks_.push_back(mask);
      ggml_tensor* p = ggml_soft_max_ext(ctx, s, mask, config_.scale, 0.0f);
      p = ggml_reshape_3d(ctx, p, b.end - first, queries * group, kv_heads);
      ggml_tensor* o;
      if (sealed == first || vst == vt) {
        o = ggml_mul_mat(ctx, value_rows(vt, first, b.end), p);
      } else {
        const auto weights = [&](int64_t from, int64_t to) {
          return ggml_cont(ctx, ggml_view_3d(ctx, p, to - from, p->ne[1], p->ne[2], p->nb[1], p->nb[2],
                                             static_cast<size_t>(from - first) * p->nb[0]));
        };
        o = ggml_add(ctx, ggml_mul_mat(ctx, value_rows(vst, first, sealed), weights(first, sealed)),
                     ggml_mul_mat(ctx, value_rows(vt, sealed, b.end), weights(sealed, b.end)));
      }
      o = heads_outside(ctx, ggml_reshape_3d(ctx, o, dim, queries, heads));  // [head_dim, heads, queries]
      out = out == nullptr ? o : ggml_concat(ctx, out, o, 2);
    }
    return ggml_reshape_2d(ctx, out, dim * heads, n);
  }

  void fill_masks() const {
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& b = blocks[i];
      const int64_t keys = masks_[i]->ne[0], first = b.end - keys;
      auto* m = static_cast<float*>(masks_[i]->data);
      for (int64_t t = b.begin; t < b.end; ++t) {
        for (int64_t j = 0; j < keys; ++j) {
          const int64_t key = first + j;
          const bool seen = key <= t && (config_.sliding_window == 0 || key > t - config_.sliding_window);
          *m++ = seen ? 0.0f : -INFINITY;
        }
      }
    }
  }

  std::vector<Block> blocks;

 private:
  static ggml_tensor* stored(ggml_context* ctx, ggml_tensor* rows, StoredCall& call) {
    if (call.codec().is_f16()) return rows;
    return through_pages(ctx, rows, call, stored_op);
  }
  static ggml_tensor* recent(ggml_context* ctx, ggml_tensor* rows, StoredCall& call) {
    if (open_codec(call.config.recent, call.codec()).is_f16()) return rows;
    return through_pages(ctx, rows, call, recent_op);
  }
  static ggml_tensor* through_pages(ggml_context* ctx, ggml_tensor* rows, StoredCall& call, ggml_custom_op_t op) {
    StoredPage(call.side_config(), call.config.recent, row_shape(call.config, call.side));  // what does not fit is refused
                                                                                            // here, not on the graph's threads
    return ggml_custom_4d(ctx, GGML_TYPE_F32, rows->ne[0], rows->ne[1], rows->ne[2], 1, &rows, 1, op, GGML_N_TASKS_MAX, &call);
  }

  std::vector<ggml_tensor*>& masks_;
  LayerConfig config_;
  StoredCall key_, value_;
};

GgmlContext graph_context() {
  return GgmlContext(
      ggml_init({kGraphNodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(kGraphNodes, false), nullptr, true}));
}

}  // namespace

Layerwise::Layerwise(const GgufModel& model, int threads, const Fp16Part& fp16)
    : model_(model),
      threads_(threads),
      dim_(model.parameters().model_dim),
      backend_(ggml_backend_cpu_init()),
      allocator_(ggml_gallocr_new(ggml_backend_cpu_buffer_type())) {
  ggml_backend_cpu_set_n_threads(backend_.get(), threads_);
  Plan plan = f16_plan(model.shape());
  set_fp16_part(fp16, plan);
  layers_ = cache_config(plan, model.shape()).layers;

  head_.context.reset(ggml_init({4 * ggml_tensor_overhead(), nullptr, true}));
  const ggml_tensor* norm = model.original("output_norm.weight");
  const ggml_tensor* output = model.original("output.weight");
  const ggml_type type = ggml_nelements(output) > kHalfHead ? GGML_TYPE_F16 : GGML_TYPE_F32;
  ggml_tensor* norm_copy = ggml_new_tensor_1d(head_.context.get(), GGML_TYPE_F32, norm->ne[0]);
  ggml_tensor* output_copy = ggml_new_tensor_2d(head_.context.get(), type, output->ne[0], output->ne[1]);
  const ggml_tensor* bias = model.stored_weights().find("output.bias") != nullptr ? model.original("output.bias") : nullptr;
  ggml_tensor* bias_copy = bias != nullptr ? ggml_new_tensor_1d(head_.context.get(), GGML_TYPE_F32, bias->ne[0]) : nullptr;
  head_.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(head_.context.get(), ggml_backend_cpu_buffer_type()));
  if (head_.buffer == nullptr) throw Error(Status::kOutOfMemory, "not enough memory for the output head in fp32");
  dequantise(norm, norm_copy);
  dequantise(output, output_copy);
  head_.weights.add("output_norm.weight", norm_copy);
  head_.weights.add("output.weight", output_copy);
  if (bias == nullptr) return;
  dequantise(bias, bias_copy);
  head_.weights.add("output.bias", bias_copy);
}

void Layerwise::dequantise(const ggml_tensor* source, ggml_tensor* to) const {
  const int64_t width = source->ne[0], rows = ggml_nelements(source) / width;
  parallel_for(threads_, static_cast<size_t>(rows), [&](size_t at) {
    const auto r = static_cast<int64_t>(at);
    std::vector<float> row(to->type == GGML_TYPE_F16 ? static_cast<size_t>(width) : 0);
    float* values = to->type == GGML_TYPE_F32 ? static_cast<float*>(to->data) + r * width : row.data();
    dequantise_row(source, at, values);
    if (to->type == GGML_TYPE_F16) ggml_fp32_to_fp16_row(values, static_cast<ggml_fp16_t*>(to->data) + r * width, width);
  });
}

const Weights& Layerwise::load(int layer) {
  if (slot_.layer == layer) return slot_.weights;
  const std::string prefix = "blk." + std::to_string(layer) + ".";
  std::vector<std::string> names;
  for (const auto& [name, tensor] : model_.stored_weights().all()) {
    if (name.starts_with(prefix)) names.push_back(name);
  }
  Slot fresh;
  fresh.layer = layer;
  fresh.context.reset(ggml_init({(names.size() + 1) * ggml_tensor_overhead(), nullptr, true}));
  std::vector<std::pair<const ggml_tensor*, ggml_tensor*>> copies;
  for (const std::string& name : names) {
    const ggml_tensor* source = model_.original(name);
    ggml_tensor* copy = ggml_new_tensor(fresh.context.get(), GGML_TYPE_F32, GGML_MAX_DIMS, source->ne);
    fresh.weights.add(name, copy);
    copies.emplace_back(source, copy);
  }
  fresh.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(fresh.context.get(), ggml_backend_cpu_buffer_type()));
  if (fresh.buffer == nullptr) throw Error(Status::kOutOfMemory, "not enough memory for a layer's weights in fp32");
  for (const auto& [source, copy] : copies) dequantise(source, copy);
  if (ggml_tensor* factors = model_.stored_weights().find("rope_freqs.weight")) fresh.weights.add("rope_freqs.weight", factors);
  slot_ = std::move(fresh);
  return slot_.weights;
}

void Layerwise::replace(int layer, const std::string& name, std::span<const float> values) {
  load(layer);
  const std::string full = "blk." + std::to_string(layer) + "." + name;
  ggml_tensor* tensor = slot_.weights.find(full + ".weight");
  if (tensor == nullptr || ggml_nelements(tensor) != static_cast<int64_t>(values.size()))
    throw Error(Status::kInternal, "layer " + std::to_string(layer) + " has no weights " + name + " of this size");
  std::copy(values.begin(), values.end(), static_cast<float*>(tensor->data));
  // A scale that stands beside them would act on these too.
  if (ggml_tensor* scale = slot_.weights.find(full + ".scale")) *static_cast<float*>(scale->data) = 1;
}

void Layerwise::compute(ggml_cgraph* graph) {
  if (ggml_backend_graph_compute(backend_.get(), graph) != GGML_STATUS_SUCCESS)
    throw Error(Status::kInternal, "a layer's graph failed");
}

std::vector<float> Layerwise::embed(std::span<const Token> tokens) {
  const GgmlContext ctx = graph_context();
  ggml_tensor* input = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, static_cast<int64_t>(tokens.size()));
  ggml_set_input(input);
  ggml_tensor* hidden = model_.architecture().embed(ctx.get(), model_.parameters(), model_.stored_weights(), input);
  ggml_set_output(hidden);
  ggml_cgraph* graph = ggml_new_graph_custom(ctx.get(), kGraphNodes, false);
  ggml_build_forward_expand(graph, hidden);
  if (!ggml_gallocr_alloc_graph(allocator_.get(), graph)) throw Error(Status::kOutOfMemory, "not enough memory for embeddings");
  std::copy(tokens.begin(), tokens.end(), static_cast<Token*>(input->data));
  compute(graph);
  return copied(hidden);
}

std::vector<float> Layerwise::forward(int layer, const LayerConfig& config, std::span<const float> hidden) {
  const auto n = static_cast<int64_t>(hidden.size()) / dim_;
  const Weights& weights = load(layer);
  const GgmlContext ctx = graph_context();
  ggml_tensor* input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, dim_, n);
  ggml_tensor* positions = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n);
  ggml_set_input(input);
  ggml_set_input(positions);
  std::vector<ggml_tensor*> masks;
  BlockAttention hooks(config, masks);
  ggml_tensor* out =
      model_.architecture().layer(ctx.get(), model_.parameters(), weights, layer, input, positions, nullptr, hooks);
  ggml_set_output(out);
  ggml_cgraph* graph = ggml_new_graph_custom(ctx.get(), kGraphNodes, false);
  ggml_build_forward_expand(graph, out);
  if (!ggml_gallocr_alloc_graph(allocator_.get(), graph)) {
    throw Error(Status::kOutOfMemory, "not enough memory to run " + std::to_string(n) + " tokens; measure with fewer");
  }
  fill(input, hidden);
  for (int64_t t = 0; t < n; ++t) static_cast<Token*>(positions->data)[t] = static_cast<Token>(t);
  hooks.fill_masks();
  compute(graph);
  return copied(out);
}

std::span<const float> Layerwise::logits(std::span<const float> hidden, std::span<const int> rows) {
  GgmlContext ctx = graph_context();
  const auto n = static_cast<int64_t>(rows.size());
  ggml_tensor* input = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, dim_, n);
  ggml_set_input(input);
  ggml_tensor* out = model_.architecture().head(ctx.get(), model_.parameters(), head_.weights, input);
  ggml_set_output(out);
  ggml_cgraph* graph = ggml_new_graph_custom(ctx.get(), kGraphNodes, false);
  ggml_build_forward_expand(graph, out);
  if (!ggml_gallocr_alloc_graph(allocator_.get(), graph)) throw Error(Status::kOutOfMemory, "not enough memory for logits");
  for (int64_t r = 0; r < n; ++r) {
    std::copy_n(hidden.begin() + static_cast<ptrdiff_t>(rows[static_cast<size_t>(r)]) * dim_, dim_,
                static_cast<float*>(input->data) + r * dim_);
  }
  compute(graph);
  head_graph_ = std::move(ctx);
  return {static_cast<const float*>(out->data), static_cast<size_t>(ggml_nelements(out))};
}

}  // namespace kvmix
