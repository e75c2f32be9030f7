// libllama with one of its own caches, in this process, as the peer to compare with.
#include <ggml.h>
#include <llama.h>

#include <algorithm>

#include "backend/cuda/device.h"
#include "engine/library_call.h"
#include "engine/model.h"
#include "kvmix/error.h"

namespace kvmix {

using LlamaContext = std::unique_ptr<llama_context, Freer<llama_free>>;

struct Peer::Impl {
  std::string name;
  LlamaModel model;
  LlamaContext context;
  ggml_type type = GGML_TYPE_F16;
  int64_t positions = 0;
  int vocab = 0;
  int64_t cells = 0;
  std::vector<float> logits;
  llama_batch batch{};
  int batch_tokens = 0;

  ~Impl() {
    if (batch.token != nullptr) llama_batch_free(batch);
  }
};

namespace {

constexpr int kChunk = 512;
constexpr int kAllLayers = 1 << 20;

ggml_type cache_type(const std::string& name) {
  if (name == "f16") return GGML_TYPE_F16;
  if (name == "q8_0") return GGML_TYPE_Q8_0;
  if (name == "q5_1") return GGML_TYPE_Q5_1;
  if (name == "q5_0") return GGML_TYPE_Q5_0;
  if (name == "q4_1") return GGML_TYPE_Q4_1;
  if (name == "q4_0") return GGML_TYPE_Q4_0;
  throw Error(Status::kInvalidArgument,
              "peer cache type \"" + name + "\" is unknown; expected f16, q8_0, q5_1, q5_0, q4_1 or q4_0");
}

double bits_of(ggml_type type) {
  return 8.0 * static_cast<double>(ggml_type_size(type)) / static_cast<double>(ggml_blck_size(type));
}

}  // namespace

Peer::Peer(const std::string& model_path, const std::string& type_name, int64_t context, int threads, int sequences,
           const std::string& device)
    : impl_(std::make_unique<Impl>()) {
  const LibraryCall call;
  Impl& impl = *impl_;
  impl.name = "llama.cpp " + type_name;
  impl.type = cache_type(type_name);
  llama_model_params weights = llama_model_default_params();
  ggml_backend_dev_t no_devices[] = {nullptr};
  if (device == "cuda") {
    cuda::check_device();
    if (!llama_supports_gpu_offload())
      throw Error(Status::kUnsupported, impl.name + ": libllama was built without CUDA; configure with -DKVMIX_CUDA=ON");
    weights.n_gpu_layers = kAllLayers;
  } else {
    weights.devices = no_devices;
    weights.n_gpu_layers = 0;
  }
  impl.model.reset(llama_model_load_from_file(model_path.c_str(), weights));
  if (impl.model == nullptr)
    throw Error(Status::kUnsupported,
                model_path + ": libllama cannot load it: " + call.reason("it gives no reason; free memory"));
  impl.vocab = llama_vocab_n_tokens(llama_model_get_vocab(impl.model.get()));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(context * sequences);
  params.n_batch = static_cast<uint32_t>(std::max(kChunk, sequences));
  params.n_ubatch = kChunk;
  params.n_seq_max = static_cast<uint32_t>(sequences);
  params.n_threads = threads;
  params.n_threads_batch = threads;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  params.kv_unified = false;
  params.offload_kqv = params.op_offload = device == "cuda";
  params.type_k = params.type_v = impl.type;
  params.no_perf = true;
  impl.context.reset(llama_init_from_model(impl.model.get(), params));
  if (impl.context == nullptr)
    throw Error(Status::kUnsupported, impl.name + ": libllama cannot make a context of " + std::to_string(context) +
                                          " tokens: " + call.reason("it gives no reason; free memory, or take a shorter one"));
  impl.batch_tokens = std::max(kChunk, sequences);
  impl.batch = llama_batch_init(impl.batch_tokens, 0, 1);
}

Peer::~Peer() = default;
Peer::Peer(Peer&&) noexcept = default;

namespace {

void add(llama_batch& batch, Token token, int64_t position, llama_seq_id sequence, bool logits) {
  const int i = batch.n_tokens++;
  batch.token[i] = token;
  batch.pos[i] = static_cast<llama_pos>(position);
  batch.n_seq_id[i] = 1;
  batch.seq_id[i][0] = sequence;
  batch.logits[i] = logits ? 1 : 0;
}

}  // namespace

std::span<const float> Peer::step(std::span<const Token> tokens, bool all_logits, bool no_logits) {
  Impl& impl = *impl_;
  impl.logits.clear();
  for (size_t done = 0; done < tokens.size();) {
    const size_t n = std::min<size_t>(kChunk, tokens.size() - done);
    impl.batch.n_tokens = 0;
    for (size_t i = 0; i < n; ++i) {
      const bool last = done + i + 1 == tokens.size();
      add(impl.batch, tokens[done + i], impl.positions + static_cast<int64_t>(i), 0, all_logits || (last && !no_logits));
    }
    const int status = llama_decode(impl.context.get(), impl.batch);
    if (status != 0) throw Error(Status::kInternal, impl.name + ": llama_decode failed with " + std::to_string(status));
    llama_synchronize(impl.context.get());
    for (size_t i = 0; i < n; ++i) {
      if (impl.batch.logits[i] == 0) continue;
      const float* row = llama_get_logits_ith(impl.context.get(), static_cast<int32_t>(i));
      impl.logits.insert(impl.logits.end(), row, row + impl.vocab);
    }
    impl.positions += static_cast<int64_t>(n);
    done += n;
  }
  return impl.logits;
}

std::span<const float> Peer::step_batch(std::span<const Token> tokens) {
  Impl& impl = *impl_;
  impl.batch.n_tokens = 0;
  for (size_t s = 0; s < tokens.size(); ++s) {
    const int64_t at = llama_memory_seq_pos_max(llama_get_memory(impl.context.get()), static_cast<llama_seq_id>(s)) + 1;
    add(impl.batch, tokens[s], at, static_cast<llama_seq_id>(s), true);
  }
  const int status = llama_decode(impl.context.get(), impl.batch);
  if (status != 0) throw Error(Status::kInternal, impl.name + ": llama_decode failed with " + std::to_string(status));
  llama_synchronize(impl.context.get());
  return {llama_get_logits(impl.context.get()), tokens.size() * static_cast<size_t>(impl.vocab)};
}

void Peer::spread(int sequences) {
  Impl& impl = *impl_;
  for (int s = 1; s < sequences; ++s) llama_memory_seq_cp(llama_get_memory(impl.context.get()), 0, s, -1, -1);
}

void Peer::clear() {
  llama_memory_clear(llama_get_memory(impl_->context.get()), true);
  impl_->positions = 0;
}

void Peer::truncate(int64_t n) {
  for (llama_seq_id s = 0; s < static_cast<llama_seq_id>(llama_n_seq_max(impl_->context.get())); ++s) {
    llama_memory_seq_rm(llama_get_memory(impl_->context.get()), s, static_cast<llama_pos>(n), -1);
  }
  impl_->positions = n;
}

double Peer::bits_per_element() const { return bits_of(impl_->type); }

size_t Peer::cache_bytes(const std::string& type_name, const ModelShape& shape, int64_t tokens) {
  // Full-context buffers as libllama lays them out, sliding-window layers at their window; cells are padded to 256.
  double elements = 0;
  for (const auto& layer : shape.layers) {
    int64_t cells = tokens;
    if (layer.sliding_window > 0) cells = std::min<int64_t>(cells, layer.sliding_window + kChunk);
    cells = (cells + 255) / 256 * 256;
    elements += 2.0 * layer.kv_heads * layer.head_dim * static_cast<double>(cells);
  }
  return static_cast<size_t>(elements * bits_of(cache_type(type_name)) / 8);
}

size_t Peer::device_bytes(const std::string& type_name, const ModelShape& shape, int64_t tokens) {
  const size_t cache = cache_bytes(type_name, shape, tokens);
  if (cache_type(type_name) == GGML_TYPE_F16) return cache;
  // Attention to a quantised cache reads an fp16 copy of a layer's, for which the graph has room; and 128 bytes a cell of
  // masks.
  int64_t widest = 0;
  for (const auto& layer : shape.layers) widest = std::max<int64_t>(widest, int64_t{layer.kv_heads} * layer.head_dim);
  return cache + static_cast<size_t>(tokens) * (2 * sizeof(uint16_t) * static_cast<size_t>(widest) + 128);
}

const std::string& Peer::name() const { return impl_->name; }

}  // namespace kvmix
