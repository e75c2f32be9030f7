#include "profile/backward.h"

#include <ggml-cpu.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kvmix/error.h"

namespace kvmix {
namespace {

// Derivative of ggml's tanh form of GELU times the incoming gradient.
void gelu_back(ggml_tensor* out, const ggml_tensor* gradient, const ggml_tensor* x, int ith, int nth, void*) {
  const auto* g = static_cast<const float*>(gradient->data);
  const auto* v = static_cast<const float*>(x->data);
  auto* o = static_cast<float*>(out->data);
  const int64_t n = ggml_nelements(out), from = n * ith / nth, to = n * (ith + 1) / nth;
  constexpr float kA = 0.044715f, kC = 0.79788456080286535588f;
  for (int64_t i = from; i < to; ++i) {
    const float t = std::tanh(kC * v[i] * (1.0f + kA * v[i] * v[i]));
    o[i] = g[i] * (0.5f * (1.0f + t) + 0.5f * v[i] * (1.0f - t * t) * kC * (1.0f + 3.0f * kA * v[i] * v[i]));
  }
}

void tanh_back(ggml_tensor* out, const ggml_tensor* gradient, const ggml_tensor* y, int ith, int nth, void*) {
  const auto* g = static_cast<const float*>(gradient->data);
  const auto* v = static_cast<const float*>(y->data);
  auto* o = static_cast<float*>(out->data);
  const int64_t n = ggml_nelements(out), from = n * ith / nth, to = n * (ith + 1) / nth;
  for (int64_t i = from; i < to; ++i) o[i] = g[i] * (1.0f - v[i] * v[i]);
}

// Tiles of a cache line each way, through a copy: rows of one matrix, a power of two apart, would meet in the cache.
void turn_around(ggml_tensor* out, int ith, int nth, void*) {
  constexpr int64_t kTile = 16;
  const ggml_tensor* t = out->src[0];
  const int64_t width = t->ne[0], rows = t->ne[1];
  const auto* from = static_cast<const float*>(t->data);
  auto* to = static_cast<float*>(out->data);
  for (int64_t row = ith * kTile; row < rows; row += nth * kTile) {
    const int64_t n = std::min(kTile, rows - row);
    for (int64_t column = 0; column < width; column += kTile) {
      const int64_t m = std::min(kTile, width - column);
      float tile[kTile][kTile];
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t c = 0; c < m; ++c) tile[c][r] = from[(row + r) * width + column + c];
      }
      for (int64_t c = 0; c < m; ++c) std::copy_n(tile[c], n, to + (column + c) * rows + row);
    }
  }
}

// [width, heads, n] to [width, n, heads], a view.
ggml_tensor* heads_outside(ggml_context* ctx, ggml_tensor* t) { return ggml_permute(ctx, t, 0, 2, 1, 3); }

// Some heads of [a, b, heads].
ggml_tensor* heads_of(ggml_context* ctx, ggml_tensor* t, int64_t first, int64_t count) {
  return ggml_view_3d(ctx, t, t->ne[0], t->ne[1], count, t->nb[1], t->nb[2], static_cast<size_t>(first) * t->nb[2]);
}

// [a, b, heads], heads behind those of `before`, which may be null.
ggml_tensor* joined(ggml_context* ctx, ggml_tensor* before, ggml_tensor* heads) {
  return before == nullptr ? heads : ggml_concat(ctx, before, heads, 2);
}

// softmax(scale K Q^T + mask) of a KV head and its group of query heads: [n, n, group]. Those of all heads together would be
// most of a layer's memory.
ggml_tensor* probabilities(ggml_context* ctx, const LayerNodes& layer, int64_t kv_head, float scale) {
  const int64_t group = layer.q->ne[1] / layer.k->ne[1];
  ggml_tensor* s = ggml_mul_mat(ctx, heads_of(ctx, heads_outside(ctx, layer.k), kv_head, 1),
                                heads_of(ctx, layer.queries, kv_head * group, group));
  return ggml_soft_max_ext(ctx, s, layer.mask, scale, 0.0f);
}

constexpr int64_t kBlockNumbers = int64_t{1} << 25;  // of a transposed block
constexpr int64_t kRowsTogether = 16;                // a cache line of a transposed row

}  // namespace

ggml_tensor* transposed(ggml_context* ctx, ggml_tensor* t, bool on_cpu) {
  if (!on_cpu) return ggml_cont(ctx, ggml_transpose(ctx, t));
  if (!ggml_is_contiguous(t)) t = ggml_cont(ctx, t);
  return ggml_custom_4d(ctx, GGML_TYPE_F32, t->ne[1], t->ne[0], 1, 1, &t, 1, turn_around, GGML_N_TASKS_MAX, nullptr);
}

ggml_tensor* DifferentiableHooks::attention(ggml_context* ctx, int64_t, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
  nodes.q = q;
  nodes.k = k;
  nodes.v = v;
  nodes.queries = ggml_cont(ctx, heads_outside(ctx, q));
  ggml_tensor* vt = ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3));  // [n, head_dim, kv_heads]
  ggml_tensor* o = nullptr;                                            // [head_dim, n, q_heads]
  for (int64_t h = 0; h < k->ne[1]; ++h)
    o = joined(ctx, o, ggml_mul_mat(ctx, heads_of(ctx, vt, h, 1), probabilities(ctx, nodes, h, p_.attention_scale)));
  nodes.out = ggml_cont_2d(ctx, heads_outside(ctx, o), q->ne[0] * q->ne[1], q->ne[2]);
  return nodes.out;
}

ggml_tensor* DifferentiableHooks::projection(ggml_context*, int64_t, Side side, ggml_tensor* input, ggml_tensor* output) {
  nodes.input = input;
  (side == Side::kKey ? nodes.key_projection : nodes.value_projection) = output;
  return output;
}

ggml_tensor* Backward::gradient(const ggml_tensor* t) const {
  const auto it = gradients_.find(t);
  return it == gradients_.end() ? nullptr : it->second;
}

void Backward::add(ggml_tensor* t, ggml_tensor* g) {
  ggml_tensor*& sum = gradients_[t];
  sum = sum == nullptr ? g : ggml_add(ctx_, sum, g);
}

void Backward::run(ggml_cgraph* graph, ggml_tensor* output, ggml_tensor* output_gradient) {
  gradients_[output] = output_gradient;
  for (int i = ggml_graph_n_nodes(graph) - 1; i >= 0; --i) {
    ggml_tensor* t = ggml_graph_node(graph, i);
    ggml_tensor* g = gradient(t);
    if (g == nullptr) continue;
    if (attention_ != nullptr && t == attention_->out) {
      propagate_attention(graph, g);
    } else {
      propagate(t, g);
    }
  }
}

// Rows [first, first + ne0) of a matrix as the columns of [ne0, in].
void Backward::fill_block(ggml_tensor* out, int ith, int nth, void* data) {
  const auto& block = *static_cast<const Block*>(data);
  const int64_t rows = out->ne[0], in = out->ne[1];
  auto* to = static_cast<float*>(out->data);
  std::vector<float> values(static_cast<size_t>(in * kRowsTogether));
  for (int64_t from = ith * kRowsTogether; from < rows; from += nth * kRowsTogether) {
    const int64_t n = std::min(kRowsTogether, rows - from);
    for (int64_t r = 0; r < n; ++r)
      dequantise_row(block.source, static_cast<size_t>(block.first + from + r), values.data() + r * in);
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t r = 0; r < n; ++r) to[i * rows + from + r] = values[static_cast<size_t>(r * in + i)];
    }
  }
}

ggml_tensor* Backward::transposed_product(const ggml_tensor* weight, ggml_tensor* g) {
  // A repacked matrix is read from its original, which has the same name in the file.
  const ggml_tensor* source = model_.original(ggml_get_name(weight));
  const int64_t in = source->ne[0], out = source->ne[1];
  const int64_t most = std::max(kRowsTogether, kBlockNumbers / in / kRowsTogether * kRowsTogether);
  ggml_tensor* sum = nullptr;
  for (int64_t first = 0; first < out; first += most) {
    const int64_t rows = std::min(most, out - first);
    blocks_.push_back({source, first});
    // Of g only its place in the order of work matters: the block is made once g is there.
    ggml_tensor* block =
        ggml_custom_4d(ctx_, GGML_TYPE_F32, rows, in, 1, 1, &g, 1, fill_block, GGML_N_TASKS_MAX, &blocks_.back());
    ggml_tensor* of_rows =
        rows == out ? g : ggml_view_2d(ctx_, g, rows, g->ne[1], g->nb[1], static_cast<size_t>(first) * g->nb[0]);
    ggml_tensor* product = ggml_mul_mat(ctx_, block, of_rows);
    sum = sum == nullptr ? product : ggml_add(ctx_, sum, product);
  }
  return sum;
}

void Backward::propagate(ggml_tensor* t, ggml_tensor* g) {
  ggml_tensor *a = t->src[0], *b = t->src[1];
  switch (t->op) {
    case GGML_OP_MUL_MAT:
      add(b, transposed_product(a, g));
      break;
    case GGML_OP_ADD:
      add(a, g);
      if (!is_weight(b)) add(b, g);
      break;
    case GGML_OP_MUL:
      add(a, ggml_mul(ctx_, g, b));
      if (!is_weight(b)) add(b, ggml_mul(ctx_, g, a));
      break;
    case GGML_OP_RMS_NORM: {
      float epsilon;
      std::memcpy(&epsilon, t->op_params, sizeof epsilon);
      add(a, ggml_rms_norm_back(ctx_, g, a, epsilon));
      break;
    }
    case GGML_OP_SCALE: {
      float factor;
      std::memcpy(&factor, t->op_params, sizeof factor);
      add(a, ggml_scale(ctx_, g, factor));
      break;
    }
    case GGML_OP_RESHAPE:
      add(a, ggml_reshape(ctx_, ggml_is_contiguous(g) ? g : ggml_cont(ctx_, g), a));
      break;
    case GGML_OP_ROPE: {
      const int32_t* o = t->op_params;  // past, dims, mode, ctx, original context, then six floats
      float f[6];
      std::memcpy(f, o + 5, sizeof f);
      add(a, ggml_rope_ext_back(ctx_, g, b, t->src[2], o[1], o[2], o[4], f[0], f[1], f[2], f[3], f[4], f[5]));
      break;
    }
    case GGML_OP_UNARY:
      switch (ggml_get_unary_op(t)) {
        case GGML_UNARY_OP_SILU:
          add(a, ggml_silu_back(ctx_, g, a));
          break;
        case GGML_UNARY_OP_GELU:
          add(a, ggml_map_custom2(ctx_, g, a, gelu_back, GGML_N_TASKS_MAX, nullptr));
          break;
        case GGML_UNARY_OP_TANH:
          add(a, ggml_map_custom2(ctx_, g, t, tanh_back, GGML_N_TASKS_MAX, nullptr));
          break;
        default:
          throw Error(Status::kInternal, std::string("no derivative of ") + ggml_unary_op_name(ggml_get_unary_op(t)));
      }
      break;
    case GGML_OP_GET_ROWS:
      break;  // the embedding: nothing before it
    default:
      throw Error(Status::kInternal, std::string("no derivative of ") + ggml_op_name(t->op));
  }
}

// out = (softmax(scale K Q^T + mask) V), heads of a group sharing K and V. A KV head's part is put into the graph before the
// next one's, so that only one's n x n numbers are there at a time.
void Backward::propagate_attention(ggml_cgraph* graph, ggml_tensor* g) {
  ggml_tensor *q = attention_->q, *k = attention_->k, *v = attention_->v;
  const float scale = model_.parameters().attention_scale;
  const int64_t dim = q->ne[0], heads = q->ne[1], n = q->ne[2], kv_heads = k->ne[1], group = heads / kv_heads;
  ggml_tensor* go = ggml_cont(ctx_, heads_outside(ctx_, ggml_reshape_3d(ctx_, g, dim, heads, n)));  // [head_dim, n, q_heads]
  ggml_tensor* vh = ggml_cont(ctx_, heads_outside(ctx_, v));
  ggml_tensor* kt = ggml_cont(ctx_, ggml_permute(ctx_, k, 1, 2, 0, 3));  // [n, head_dim, kv_heads]
  // Rows of all heads of a group against each other, which sums over them: [a, n, group] and [b, n, group] to [a, b, 1].
  const auto over_group = [&](ggml_tensor* a, ggml_tensor* b) {
    const auto flat = [&](ggml_tensor* t) { return transposed(ctx_, ggml_reshape_2d(ctx_, t, t->ne[0], n * group), on_cpu_); };
    ggml_tensor* product = ggml_mul_mat(ctx_, flat(a), flat(b));
    return ggml_reshape_3d(ctx_, product, product->ne[0], product->ne[1], 1);
  };
  ggml_tensor *gq = nullptr, *gk = nullptr, *gv = nullptr;
  for (int64_t h = 0; h < kv_heads; ++h) {
    ggml_tensor* p = probabilities(ctx_, *attention_, h, scale);
    ggml_tensor* go_h = heads_of(ctx_, go, h * group, group);
    ggml_tensor* gp = ggml_mul_mat(ctx_, heads_of(ctx_, vh, h, 1), go_h);                       // [nk, nq, group]
    ggml_tensor* gs = ggml_soft_max_ext_back(ctx_, gp, p, scale, 0.0f);                         // [nk, nq, group]
    ggml_tensor* gq_h = ggml_mul_mat(ctx_, heads_of(ctx_, kt, h, 1), gs);                       // [head_dim, nq, group]
    ggml_tensor* gk_h = over_group(heads_of(ctx_, attention_->queries, h * group, group), gs);  // [head_dim, nk, 1]
    ggml_tensor* gv_h = over_group(go_h, p);                                                    // [head_dim, nk, 1]
    for (ggml_tensor* t : {gv_h, gq_h, gk_h}) ggml_build_forward_expand(graph, t);
    gq = joined(ctx_, gq, gq_h);
    gk = joined(ctx_, gk, gk_h);
    gv = joined(ctx_, gv, gv_h);
  }
  const auto heads_inside = [&](ggml_tensor* t) { return ggml_cont(ctx_, heads_outside(ctx_, t)); };
  add(q, heads_inside(gq));
  add(k, heads_inside(gk));
  add(v, heads_inside(gv));
}

}  // namespace kvmix
