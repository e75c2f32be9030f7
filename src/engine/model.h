// A loaded model's inside: what the engine and the measurements need beyond the public Model.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>
#include <gguf.h>
#include <llama.h>

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "engine/architecture.h"
#include "engine/gguf_file.h"
#include "kvmix/engine.h"

namespace kvmix {

template <auto Free>
struct Freer {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
using GgmlContext = std::unique_ptr<ggml_context, Freer<ggml_free>>;
using GgufContext = std::unique_ptr<gguf_context, Freer<gguf_free>>;
using BackendBuffer = std::unique_ptr<ggml_backend_buffer, Freer<ggml_backend_buffer_free>>;
using LlamaModel = std::unique_ptr<llama_model, Freer<llama_model_free>>;

class GgufModel final : public Model {
 public:
  explicit GgufModel(const std::string& path);

  const ModelShape& shape() const override { return shape_; }
  const std::string& path() const override { return file_.path(); }
  size_t weight_bytes() const override { return weight_bytes_; }
  int vocab_size() const override { return static_cast<int>(parameters_.vocab); }
  std::vector<Token> tokenize(std::string_view text, bool add_bos, bool special) const override;
  std::string token_text(Token token) const override;
  std::string detokenize(std::span<const Token> tokens) const override;
  bool is_end(Token token) const override;
  Token bos() const override;
  ChatTemplate chat_template() const override;
  std::vector<Token> chat_tokens(std::span<const ChatMessage> messages, const ChatTemplate& chat_template) const override;

  const Architecture& architecture() const { return *architecture_; }
  const HyperParameters& parameters() const { return parameters_; }
  // For the CPU: those that it multiplies faster in an order of its own are copied into that order by the first call.
  const Weights& weights() const;
  // Every tensor as the file has it.
  const Weights& stored_weights() const { return stored_; }
  // What engines share on a device: made for the first, gone with the last.
  std::shared_ptr<void> shared_on_device(const std::function<std::shared_ptr<void>()>& make) const;
  // The tensor as the file has it, also where weights() holds a repacked copy.
  const ggml_tensor* original(const std::string& name) const;
  // A tensor with a value that is NaN or infinite; empty if none has. Reads all weights.
  std::string not_finite() const;
  // Throws kCorrupt: `where` in a computation with this model such values came up.
  [[noreturn]] void refuse_not_finite(const std::string& where) const;

 private:
  void load_weights();
  void add_fused(const GgufFile::Tensor& tensor, const std::string& prefix, const std::string& kind);
  void place(const ggml_tensor* type, const std::string& name, int64_t ne0, int64_t ne1, char* data, size_t part);
  void check_weights() const;
  void repack_weights() const;
  void set_key_offsets(int64_t layer, ModelShape::Layer& shape) const;
  std::vector<std::string> special_texts() const;

  GgufFile file_;
  const Architecture* architecture_ = nullptr;
  HyperParameters parameters_;
  ModelShape shape_;
  size_t weight_bytes_ = 0;
  GgmlContext tensors_;
  std::vector<BackendBuffer> mapped_buffers_;
  Weights stored_;
  mutable std::once_flag repacked_once_;
  mutable GgmlContext repacked_;
  mutable std::vector<BackendBuffer> repacked_buffers_;
  mutable Weights cpu_weights_;
  mutable std::mutex device_mutex_;
  mutable std::weak_ptr<void> on_device_;
  LlamaModel vocabulary_;
};

// The inside of a Model made by Model::load.
const GgufModel& gguf_model(const Model& model);
// A row of a matrix of the file, of any type that has floats, to ne[0] floats.
void dequantise_row(const ggml_tensor* source, size_t row, float* out);
// Of these columns alone.
void dequantise_part(const ggml_tensor* source, size_t row, int64_t first, int64_t count, float* out);
bool all_finite(std::span<const float> values);
// Sets ggml's and libllama's handlers once: see library_call.h.
void quiet_libraries();

}  // namespace kvmix
