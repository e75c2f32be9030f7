// Tiny models with random weights, written as GGUF files: every architecture without a download.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix::testing {

struct TinyModel {
  std::string architecture;
  int layers = 3;
  bool qkv_bias = false, qk_norm = false, post_norms = false, output_head = false, rope_factors = false;
  std::string rope_scaling = {};  // empty: none
  int sliding_window = 0;
  float rope_base = 20000.0f;
  bool ffn_bias = false, output_bias = false;
  bool fused = false;             // attn_qkv in place of three projections
  bool lists = false;             // head counts and feed-forward lengths as one number a layer
  std::vector<int> pattern = {};  // attention.sliding_window_pattern: one number, or one a layer
  int parts = 1;                  // files: path is NAME.gguf or, with more, the prefix NAME of NAME-00001-of-0000N.gguf
  int head_dim = kHeadDim;
  std::string matrices = "f32";                      // or "f16", "bf16"
  std::string extra_tensor = {}, extra_number = {};  // names of a vector, and of a key that is set to 1
  std::string not_finite = {};                       // tensor with a NaN
  int attention_inputs = kDim;                       // gains of attn_norm that are not 0
  std::string name_ending = {};
  std::string pre = {};  // the pre-tokenizer of a vocabulary of byte pairs
  std::string chat_template = {};
  int context = kContext;
  static constexpr int kDim = 128, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kFfn = 192, kContext = 1024;
};

inline std::vector<TinyModel> tiny_models() {
  return {{.architecture = "llama", .output_head = true},
          {.architecture = "llama", .rope_factors = true},
          {.architecture = "llama", .rope_scaling = "linear"},
          {.architecture = "llama", .rope_scaling = "yarn"},
          {.architecture = "qwen2", .qkv_bias = true},
          {.architecture = "qwen3", .qk_norm = true, .output_head = true},
          {.architecture = "gemma3", .layers = 7, .qk_norm = true, .post_norms = true, .sliding_window = 96},
          {.architecture = "llama", .ffn_bias = true},
          {.architecture = "qwen2", .qkv_bias = true, .output_head = true, .output_bias = true},
          {.architecture = "llama", .qkv_bias = true, .fused = true},
          {.architecture = "llama", .lists = true},
          {.architecture = "gemma3", .layers = 4, .qk_norm = true, .post_norms = true, .sliding_window = 96, .pattern = {3}},
          {.architecture = "gemma3",
           .layers = 4,
           .qk_norm = true,
           .post_norms = true,
           .sliding_window = 96,
           .pattern = {0, 1, 1, 0}}};
}

inline std::string tiny_name(const TinyModel& m) {
  return m.architecture + (m.ffn_bias ? "_ffn_bias" : "") + (m.output_bias ? "_output_bias" : "") + (m.fused ? "_fused" : "") +
         (m.lists ? "_lists" : "") +
         (m.pattern.empty()       ? ""
          : m.pattern.size() == 1 ? "_pattern"
                                  : "_patterns") +
         (m.matrices == "f32" ? "" : "_" + m.matrices) + (m.rope_factors ? "_factors" : "") +
         (m.rope_scaling.empty() ? "" : "_" + m.rope_scaling);
}

inline void PrintTo(const TinyModel& m, std::ostream* out) { *out << tiny_name(m); }

inline std::string tiny_part(const std::string& prefix, int part, int parts) {
  char ending[64];
  std::snprintf(ending, sizeof ending, "-%05d-of-%05d.gguf", part + 1, parts);
  return prefix + ending;
}

// Writes the model to `path`. The vocabulary is the smallest that libllama's SentencePiece kind takes: specials, all bytes
// and some pieces.
inline void write_tiny_model(const TinyModel& m, const std::string& path) {
  using Gguf = std::unique_ptr<gguf_context, decltype(&gguf_free)>;
  using Ggml = std::unique_ptr<ggml_context, decltype(&ggml_free)>;
  const Gguf gguf(gguf_init_empty(), gguf_free);
  const Ggml ctx(ggml_init({size_t{16} << 20, nullptr, false}), ggml_free);
  const std::string& a = m.architecture;
  const auto number = [&](const std::string& key, int value) {
    gguf_set_val_u32(gguf.get(), (a + "." + key).c_str(), static_cast<uint32_t>(value));
  };
  const auto real = [&](const std::string& key, float value) { gguf_set_val_f32(gguf.get(), (a + "." + key).c_str(), value); };
  gguf_set_val_str(gguf.get(), "general.architecture", a.c_str());
  gguf_set_val_str(gguf.get(), "general.name", ("tiny " + tiny_name(m) + m.name_ending).c_str());
  number("block_count", m.layers);
  number("context_length", m.context);
  number("embedding_length", TinyModel::kDim);
  const auto list = [&](const std::string& key, const std::vector<int32_t>& values) {
    gguf_set_arr_data(gguf.get(), (a + "." + key).c_str(), GGUF_TYPE_INT32, values.data(), values.size());
  };
  const auto each = [&](const std::string& key, int value) {
    m.lists ? list(key, std::vector<int32_t>(static_cast<size_t>(m.layers), value)) : number(key, value);
  };
  each("feed_forward_length", TinyModel::kFfn);
  each("attention.head_count", TinyModel::kHeads);
  each("attention.head_count_kv", TinyModel::kKvHeads);
  number("attention.key_length", m.head_dim);
  number("attention.value_length", m.head_dim);
  if (m.pattern.size() == 1) number("attention.sliding_window_pattern", m.pattern[0]);
  if (m.pattern.size() > 1) {
    const std::vector<int8_t> local(m.pattern.begin(), m.pattern.end());
    gguf_set_arr_data(gguf.get(), (a + ".attention.sliding_window_pattern").c_str(), GGUF_TYPE_BOOL, local.data(),
                      local.size());
  }
  if (!m.extra_number.empty()) gguf_set_val_u32(gguf.get(), m.extra_number.c_str(), 1);
  real("attention.layer_norm_rms_epsilon", 1e-6f);
  real("rope.freq_base", m.rope_base);
  if (m.sliding_window > 0) number("attention.sliding_window", m.sliding_window);
  if (!m.rope_scaling.empty()) {
    gguf_set_val_str(gguf.get(), (a + ".rope.scaling.type").c_str(), m.rope_scaling.c_str());
    real("rope.scaling.factor", 4.0f);
    number("rope.scaling.original_context_length", m.context / 4);
  }

  std::vector<std::string> pieces = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", b);
    pieces.emplace_back(text);
    types.push_back(6);
  }
  for (char c = 'a'; c <= 'z'; ++c) {
    for (const std::string& piece : {std::string(1, c), "\xe2\x96\x81" + std::string(1, c)}) {
      pieces.push_back(piece);
      types.push_back(1);
    }
  }
  const size_t vocab = pieces.size();
  std::vector<const char*> texts;
  std::vector<float> scores;
  for (const std::string& piece : pieces) {
    texts.push_back(piece.c_str());
    scores.push_back(-static_cast<float>(texts.size()));
  }
  if (!m.pre.empty()) {  // byte pairs
    std::fill(types.begin() + 3, types.end(), 1);
    const char* merge = "a b";
    gguf_set_arr_str(gguf.get(), "tokenizer.ggml.merges", &merge, 1);
    gguf_set_val_str(gguf.get(), "tokenizer.ggml.pre", m.pre.c_str());
  }
  gguf_set_val_str(gguf.get(), "tokenizer.ggml.model", m.pre.empty() ? "llama" : "gpt2");
  gguf_set_arr_str(gguf.get(), "tokenizer.ggml.tokens", texts.data(), vocab);
  gguf_set_arr_data(gguf.get(), "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores.data(), vocab);
  gguf_set_arr_data(gguf.get(), "tokenizer.ggml.token_type", GGUF_TYPE_INT32, types.data(), vocab);
  if (!m.chat_template.empty()) gguf_set_val_str(gguf.get(), "tokenizer.chat_template", m.chat_template.c_str());
  gguf_set_val_u32(gguf.get(), "tokenizer.ggml.bos_token_id", 1);
  gguf_set_val_u32(gguf.get(), "tokenizer.ggml.eos_token_id", 2);

  std::mt19937 random(7);
  std::vector<ggml_tensor*> tensors;
  std::normal_distribution<float> normal;
  const auto tensor = [&](const std::string& name, int64_t ne0, int64_t ne1, float mean, float deviation) {
    ggml_tensor* t =
        ne1 == 1 ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ne0) : ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1);
    ggml_set_name(t, name.c_str());
    auto* values = static_cast<float*>(t->data);
    for (int64_t i = 0; i < ne0 * ne1; ++i) values[i] = mean + deviation * normal(random);
    if (name == m.not_finite) values[ne0 * ne1 / 2] = NAN;
    if (name.ends_with("attn_norm.weight")) std::fill(values + m.attention_inputs, values + ne0, 0.0f);
    if (m.matrices != "f32" && ne1 > 1) {
      const bool bf16 = m.matrices == "bf16";
      ggml_tensor* rounded = ggml_new_tensor_2d(ctx.get(), bf16 ? GGML_TYPE_BF16 : GGML_TYPE_F16, ne0, ne1);
      ggml_set_name(rounded, name.c_str());
      ggml_get_type_traits(rounded->type)->from_float_ref(values, rounded->data, ne0 * ne1);
      t = rounded;
    }
    tensors.push_back(t);
  };
  const auto matrix = [&](const std::string& name, int64_t in, int64_t out) {
    tensor(name, in, out, 0, 1.5f / std::sqrt(static_cast<float>(in)));
  };
  const auto norm = [&](const std::string& name, int64_t n) { tensor(name, n, 1, 1.0f, 0.1f); };
  const int64_t q = TinyModel::kHeads * m.head_dim, kv = TinyModel::kKvHeads * m.head_dim;
  matrix("token_embd.weight", TinyModel::kDim, static_cast<int64_t>(vocab));
  norm("output_norm.weight", TinyModel::kDim);
  if (m.output_head) matrix("output.weight", TinyModel::kDim, static_cast<int64_t>(vocab));
  if (m.rope_factors) tensor("rope_freqs.weight", m.head_dim / 2, 1, 2.0f, 0.3f);
  for (int l = 0; l < m.layers; ++l) {
    const std::string b = "blk." + std::to_string(l) + ".";
    norm(b + "attn_norm.weight", TinyModel::kDim);
    if (m.fused) matrix(b + "attn_qkv.weight", TinyModel::kDim, q + 2 * kv);
    if (!m.fused) matrix(b + "attn_q.weight", TinyModel::kDim, q);
    if (!m.fused) matrix(b + "attn_k.weight", TinyModel::kDim, kv);
    if (!m.fused) matrix(b + "attn_v.weight", TinyModel::kDim, kv);
    matrix(b + "attn_output.weight", q, TinyModel::kDim);
    norm(b + "ffn_norm.weight", TinyModel::kDim);
    matrix(b + "ffn_gate.weight", TinyModel::kDim, TinyModel::kFfn);
    matrix(b + "ffn_up.weight", TinyModel::kDim, TinyModel::kFfn);
    matrix(b + "ffn_down.weight", TinyModel::kFfn, TinyModel::kDim);
    if (m.qkv_bias && m.fused) {
      tensor(b + "attn_qkv.bias", q + 2 * kv, 1, 0, 0.5f);
    } else if (m.qkv_bias) {
      tensor(b + "attn_q.bias", q, 1, 0, 0.5f);
      tensor(b + "attn_k.bias", kv, 1, 0, 0.5f);
      tensor(b + "attn_v.bias", kv, 1, 0, 0.5f);
    }
    if (m.ffn_bias) {
      tensor(b + "ffn_gate.bias", TinyModel::kFfn, 1, 0, 0.5f);
      tensor(b + "ffn_up.bias", TinyModel::kFfn, 1, 0, 0.5f);
      tensor(b + "ffn_down.bias", TinyModel::kDim, 1, 0, 0.5f);
    }
    if (m.qk_norm) {
      norm(b + "attn_q_norm.weight", m.head_dim);
      norm(b + "attn_k_norm.weight", m.head_dim);
    }
    if (m.post_norms) {
      norm(b + "post_attention_norm.weight", TinyModel::kDim);
      norm(b + "post_ffw_norm.weight", TinyModel::kDim);
    }
  }
  if (m.output_bias) tensor("output.bias", static_cast<int64_t>(vocab), 1, 0, 0.5f);
  if (!m.extra_tensor.empty()) tensor(m.extra_tensor, TinyModel::kDim, 1, 0, 0.5f);
  for (int part = 0; part < m.parts; ++part) {
    const Gguf own(part == 0 ? nullptr : gguf_init_empty(), gguf_free);
    gguf_context* file = part == 0 ? gguf.get() : own.get();
    std::string name = path;
    if (m.parts > 1) {
      gguf_set_val_u16(file, "split.no", static_cast<uint16_t>(part));
      gguf_set_val_u16(file, "split.count", static_cast<uint16_t>(m.parts));
      gguf_set_val_i32(file, "split.tensors.count", static_cast<int32_t>(tensors.size()));
      name = tiny_part(path, part, m.parts);
    }
    const size_t n = tensors.size(), parts = static_cast<size_t>(m.parts), p = static_cast<size_t>(part);
    for (size_t i = n * p / parts; i < n * (p + 1) / parts; ++i) gguf_add_tensor(file, tensors[i]);
    if (!gguf_write_to_file(file, name.c_str(), false)) throw std::runtime_error("cannot write " + name);
  }
}

inline std::vector<Token> random_tokens(size_t n, int vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Token> tokens(n);
  for (Token& t : tokens) t = static_cast<Token>(random() % static_cast<unsigned>(vocab));
  return tokens;
}

// A folder of a test's own, removed with what is in it.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() / (name + "-" + std::to_string(std::random_device{}()))) {
    std::filesystem::create_directories(path_);
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

}  // namespace kvmix::testing
