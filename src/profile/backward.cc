#include "profile/backward.h"

#include <ggml-cpu.h>

#include <cmath>
#include <cstring>
#include <set>

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

ggml_tensor* heads_outside(ggml_context* ctx, ggml_tensor* t) { return ggml_permute(ctx, t, 0, 2, 1, 3); }
ggml_tensor* transposed(ggml_context* ctx, ggml_tensor* t) { return ggml_cont(ctx, ggml_transpose(ctx, t)); }

// softmax(scale K Q^T + mask): [n, n, q_heads].
ggml_tensor* probabilities(ggml_context* ctx, const LayerNodes& layer, float scale) {
  ggml_tensor* s = ggml_mul_mat(ctx, heads_outside(ctx, layer.k), heads_outside(ctx, layer.q));
  return ggml_soft_max_ext(ctx, s, layer.mask, scale, 0.0f);
}

}  // namespace

TransposedWeights::TransposedWeights(const GgufModel& model) {
  std::vector<const ggml_tensor*> matrices;
  std::set<const ggml_tensor*> seen;
  for (const auto& [name, tensor] : model.weights().all()) {
    if (ggml_n_dims(tensor) == 2 && seen.insert(tensor).second) matrices.push_back(tensor);
  }
  context_.reset(ggml_init({(matrices.size() + 1) * ggml_tensor_overhead(), nullptr, true}));
  for (const ggml_tensor* m : matrices) transposed_[m] = ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, m->ne[1], m->ne[0]);
  buffer_.reset(ggml_backend_alloc_ctx_tensors_from_buft(context_.get(), ggml_backend_cpu_buffer_type()));
  if (buffer_ == nullptr)
    throw Error(Status::kOutOfMemory,
                "not enough memory for the transposed fp32 weights that gradients need; free some, or take a smaller model");
  std::vector<float> row;
  for (const ggml_tensor* m : matrices) {
    // A repacked matrix is read from its original, which has the same name in the file.
    const ggml_tensor* source = model.original(ggml_get_name(m));
    const int64_t in = source->ne[0], out = source->ne[1];
    row.resize(static_cast<size_t>(in));
    auto* to = static_cast<float*>(transposed_.at(m)->data);
    for (int64_t o = 0; o < out; ++o) {
      dequantise_row(source, static_cast<size_t>(o), row.data());
      for (int64_t i = 0; i < in; ++i) to[i * out + o] = row[static_cast<size_t>(i)];
    }
  }
}

ggml_tensor* DifferentiableHooks::attention(ggml_context* ctx, int64_t il, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v) {
  LayerNodes& layer = layers[static_cast<size_t>(il)];
  layer.q = q;
  layer.k = k;
  layer.v = v;
  layer.mask = p_.is_local(il) ? inputs_.mask_local : inputs_.mask_global;
  ggml_tensor* vt = ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3));  // [n, head_dim, kv_heads]
  ggml_tensor* o = ggml_mul_mat(ctx, vt, probabilities(ctx, layer, p_.attention_scale));
  layer.out = ggml_cont_2d(ctx, heads_outside(ctx, o), q->ne[0] * q->ne[1], q->ne[2]);
  return layer.out;
}

ggml_tensor* DifferentiableHooks::projection(ggml_context*, int64_t il, Side side, ggml_tensor* input, ggml_tensor* output) {
  LayerNodes& layer = layers[static_cast<size_t>(il)];
  layer.input = input;
  (side == Side::kKey ? layer.key_projection : layer.value_projection) = output;
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

void Backward::run(ggml_cgraph* forward, ggml_tensor* output, ggml_tensor* output_gradient) {
  gradients_[output] = output_gradient;
  std::map<const ggml_tensor*, LayerNodes*> attentions;
  for (LayerNodes& layer : layers_) attentions[layer.out] = &layer;
  for (int i = ggml_graph_n_nodes(forward) - 1; i >= 0; --i) {
    ggml_tensor* t = ggml_graph_node(forward, i);
    ggml_tensor* g = gradient(t);
    if (g == nullptr) continue;
    const auto attention = attentions.find(t);
    if (attention != attentions.end()) {
      propagate_attention(*attention->second, g);
    } else {
      propagate(t, g);
    }
  }
}

void Backward::propagate(ggml_tensor* t, ggml_tensor* g) {
  ggml_tensor *a = t->src[0], *b = t->src[1];
  switch (t->op) {
    case GGML_OP_MUL_MAT:
      add(b, ggml_mul_mat(ctx_, weights_.of(a), g));
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

// out = (softmax(scale K Q^T + mask) V), heads of a group sharing K and V.
void Backward::propagate_attention(LayerNodes& layer, ggml_tensor* g) {
  ggml_tensor *q = layer.q, *k = layer.k, *v = layer.v;
  // Made again: those of all layers together would be most of the memory of a pass.
  ggml_tensor* p = probabilities(ctx_, layer, p_.attention_scale);
  const int64_t dim = q->ne[0], heads = q->ne[1], n = q->ne[2], kv_heads = k->ne[1], group = heads / kv_heads;
  // [head_dim, n, q_heads]
  ggml_tensor* go = ggml_cont(ctx_, heads_outside(ctx_, ggml_reshape_3d(ctx_, g, dim, heads, n)));
  ggml_tensor* gp = ggml_mul_mat(ctx_, heads_outside(ctx_, v), go);  // [nk, nq, q_heads]
  ggml_tensor* gs = ggml_soft_max_ext_back(ctx_, gp, p, p_.attention_scale, 0.0f);
  ggml_tensor* kt = ggml_cont(ctx_, ggml_permute(ctx_, k, 1, 2, 0, 3));  // [n, head_dim, kv_heads]
  ggml_tensor* gq = ggml_mul_mat(ctx_, kt, gs);                          // [head_dim, nq, q_heads]
  add(q, ggml_cont(ctx_, heads_outside(ctx_, gq)));

  ggml_tensor* qt = ggml_cont(ctx_, ggml_permute(ctx_, q, 1, 2, 0, 3));  // [nq, head_dim, q_heads]
  ggml_tensor* got = transposed(ctx_, go);                               // [nq, head_dim, q_heads]
  // Sum over the query heads of a group: [head_dim, nk, q_heads] to [head_dim, nk, kv_heads].
  const auto over_group = [&](ggml_tensor* t) {
    if (group == 1) return t;
    ggml_tensor* flat = ggml_reshape_3d(ctx_, t, dim * n, group, kv_heads);
    ggml_tensor* shape = ggml_new_tensor_3d(ctx_, GGML_TYPE_F32, dim * n, 1, kv_heads);
    return ggml_reshape_3d(ctx_, ggml_repeat_back(ctx_, flat, shape), dim, n, kv_heads);
  };
  const auto key_gradient = [&](ggml_tensor* score_gradient) {
    return over_group(ggml_mul_mat(ctx_, qt, transposed(ctx_, score_gradient)));
  };
  const auto value_gradient = [&](ggml_tensor* weights) {
    return over_group(ggml_mul_mat(ctx_, got, transposed(ctx_, weights)));
  };
  add(k, ggml_cont(ctx_, heads_outside(ctx_, key_gradient(gs))));
  add(v, ggml_cont(ctx_, heads_outside(ctx_, value_gradient(p))));
}

}  // namespace kvmix
