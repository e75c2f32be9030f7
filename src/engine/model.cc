#include "engine/model.h"

#include <ggml-cpu.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>

#include "engine/chat_template.h"
#include "engine/gguf_check.h"
#include "engine/library_call.h"
#include "engine/special_text.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// A name for people: without control characters, which a terminal would obey.
std::string printable(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  return text;
}

// libllama's tokenizers match with std::regex, which recurses once or more for each character of a match.
constexpr size_t kRunOnAnyStack = 2048, kLongestRun = size_t{1} << 19, kStackOfACharacter = 2048;

size_t longest_run(std::string_view text) {
  size_t longest = 0, run = 0;
  bool space = false;
  for (const char c : text) {
    const bool is_space = c == ' ' || (c >= '\t' && c <= '\r');
    run = is_space == space ? run + 1 : 1;
    space = is_space;
    longest = std::max(longest, run);
  }
  return longest;
}

// Runs work on a thread with a stack of this size; its pages are taken as they are used.
void run_on_stack(size_t bytes, const std::function<void()>& work) {
  struct Call {
    const std::function<void()>* work;
    std::exception_ptr error;
  } call{&work, nullptr};
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, bytes);
  pthread_t thread;
  const int status = pthread_create(
      &thread, &attributes,
      [](void* data) -> void* {
        auto& c = *static_cast<Call*>(data);
        try {
          (*c.work)();
        } catch (...) {
          c.error = std::current_exception();
        }
        return nullptr;
      },
      &call);
  pthread_attr_destroy(&attributes);
  if (status != 0) {
    throw Error(Status::kOutOfMemory, "not enough memory for a stack of " + std::to_string(bytes >> 20) +
                                          " MiB, which a text with long runs of characters takes; break its lines");
  }
  pthread_join(thread, nullptr);
  if (call.error) std::rethrow_exception(call.error);
}

}  // namespace

GgufModel::GgufModel(const std::string& path) : file_(path) {
  const LibraryCall call;
  const GgufMetadata metadata(file_.metadata(), file_.path());
  architecture_ = &find_architecture(metadata.text("general.architecture"), file_.path());
  parameters_ = architecture_->parameters(metadata);
  load_weights();
  check_tokenizer(file_.metadata(), file_.path());

  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  ggml_backend_dev_t no_devices[] = {nullptr};
  params.devices = no_devices;
  vocabulary_.reset(llama_model_load_from_file(file_.path().c_str(), params));
  if (vocabulary_ == nullptr) {
    throw Error(Status::kUnsupported, file_.path() + ": libllama cannot read its tokenizer: " +
                                          call.reason("it gives no reason; free memory, or obtain the file again"));
  }
  check_special_tokens(llama_model_get_vocab(vocabulary_.get()), file_.path());
  const int tokens = llama_vocab_n_tokens(llama_model_get_vocab(vocabulary_.get()));
  if (tokens != parameters_.vocab) {
    throw Error(Status::kCorrupt, file_.path() + ": the tokenizer has " + std::to_string(tokens) + " tokens, the embedding " +
                                      std::to_string(parameters_.vocab) + "; obtain the file again");
  }

  shape_.name = printable(metadata.text_or("general.name", path.substr(path.find_last_of('/') + 1)));
  shape_.architecture = architecture_->name();
  shape_.context_tokens = parameters_.context;
  for (int64_t l = 0; l < parameters_.layers; ++l) {
    shape_.layers.push_back(
        {static_cast<int>(parameters_.q_heads), static_cast<int>(parameters_.kv_heads), static_cast<int>(parameters_.head_dim),
         parameters_.is_local(l) ? static_cast<int>(parameters_.sliding_window) : 0, parameters_.attention_scale, 0.0f});
    set_key_offsets(l, shape_.layers.back());
  }
}

const Weights& GgufModel::weights() const {
  std::call_once(repacked_once_, [this] { repack_weights(); });
  return cpu_weights_;
}

std::shared_ptr<void> GgufModel::shared_on_device(const std::function<std::shared_ptr<void>()>& make) const {
  const std::lock_guard lock(device_mutex_);
  std::shared_ptr<void> shared = on_device_.lock();
  if (shared == nullptr) on_device_ = shared = make();
  return shared;
}

// Matrices that ggml's CPU backend multiplies faster in an order of its own are copied into that order, as llama.cpp does.
void GgufModel::repack_weights() const {
  cpu_weights_ = stored_;
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto extra_types = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (extra_types == nullptr) return;
  std::vector<std::pair<std::string, ggml_tensor*>> matrices;
  for (const auto& [name, tensor] : stored_.all()) {
    const bool embedding = name == "token_embd.weight";
    if (ggml_n_dims(tensor) == 2 && (!embedding || stored_.find("output.weight") == nullptr)) {
      // A tied embedding is copied for the output head; the lookup keeps the rows as they are.
      matrices.emplace_back(embedding ? "output.weight" : name, tensor);
    }
  }
  repacked_.reset(ggml_init({(matrices.size() * 3 + 1) * ggml_tensor_overhead(), nullptr, true}));
  for (const auto& [name, tensor] : matrices) {
    for (ggml_backend_buffer_type_t* type = extra_types(device); type != nullptr && *type != nullptr; ++type) {
      const GgmlContext probe(ggml_init({4 * ggml_tensor_overhead(), nullptr, true}));
      ggml_tensor* weight = ggml_dup_tensor(probe.get(), tensor);
      ggml_tensor* input = ggml_new_tensor_2d(probe.get(), GGML_TYPE_F32, tensor->ne[0], 512);
      ggml_tensor* product = ggml_mul_mat(probe.get(), weight, input);
      const BackendBuffer empty(ggml_backend_buft_alloc_buffer(*type, 0));
      weight->buffer = empty.get();
      const bool supported = ggml_backend_dev_supports_op(device, product);
      weight->buffer = nullptr;
      if (!supported) continue;
      BackendBuffer buffer(ggml_backend_buft_alloc_buffer(*type, ggml_backend_buft_get_alloc_size(*type, tensor)));
      if (buffer == nullptr) throw Error(Status::kOutOfMemory, file_.path() + ": not enough memory for tensor " + name);
      ggml_tensor* copy = ggml_dup_tensor(repacked_.get(), tensor);
      ggml_set_name(copy, name.c_str());
      ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
      ggml_backend_tensor_alloc(buffer.get(), copy, ggml_backend_buffer_get_base(buffer.get()));
      ggml_backend_tensor_set(copy, tensor->data, 0, ggml_nbytes(tensor));
      cpu_weights_.add(name, copy);
      repacked_buffers_.push_back(std::move(buffer));
      break;
    }
  }
}

std::string GgufModel::not_finite() const {
  std::vector<float> row;
  for (const auto& t : file_.tensors()) {
    const ggml_tensor* tensor = ggml_get_tensor(tensors_.get(), t.name.c_str());
    if (tensor == nullptr) continue;  // fused: its parts are there under other names
    row.resize(static_cast<size_t>(tensor->ne[0]));
    for (int64_t r = 0; r < tensor->ne[1]; ++r) {
      dequantise_row(tensor, static_cast<size_t>(r), row.data());
      if (!all_finite(row)) return t.name;
    }
  }
  return "";
}

void GgufModel::refuse_not_finite(const std::string& where) const {
  const std::string tensor = not_finite();
  throw Error(Status::kCorrupt, path() + ": " + where + " are not finite: " +
                                    (tensor.empty() ? "its numbers grow beyond fp32 or fp16; take another file of this model"
                                                    : "tensor " + tensor + " has such values; obtain the file again"));
}

bool all_finite(std::span<const float> values) {
  float sum = 0;  // x - x is 0 for finite numbers alone
  for (const float x : values) sum += x - x;
  return sum == 0.0f;
}

const ggml_tensor* GgufModel::original(const std::string& name) const {
  const ggml_tensor* tensor = ggml_get_tensor(tensors_.get(), name.c_str());
  // The head of a tied model is a copy of the embedding.
  if (tensor == nullptr && name == "output.weight") tensor = ggml_get_tensor(tensors_.get(), "token_embd.weight");
  if (tensor == nullptr) throw Error(Status::kInternal, file_.path() + ": no tensor " + name);
  return tensor;
}

std::shared_ptr<const Model> Model::load(const std::string& path) { return std::make_shared<GgufModel>(path); }

void dequantise_row(const ggml_tensor* source, size_t row, float* out) { dequantise_part(source, row, 0, source->ne[0], out); }

void dequantise_part(const ggml_tensor* source, size_t row, int64_t first, int64_t count, float* out) {
  const int64_t block = ggml_blck_size(source->type), begin = first / block * block,
                end = (first + count + block - 1) / block * block;
  const char* from = static_cast<const char*>(source->data) + row * source->nb[1] +
                     static_cast<size_t>(begin / block) * ggml_type_size(source->type);
  if (source->type == GGML_TYPE_F32) {
    std::memcpy(out, from, static_cast<size_t>(count) * sizeof(float));
  } else if (end - begin == count) {
    ggml_get_type_traits(source->type)->to_float(from, out, count);
  } else {
    std::vector<float> blocks(static_cast<size_t>(end - begin));
    ggml_get_type_traits(source->type)->to_float(from, blocks.data(), end - begin);
    std::copy_n(blocks.begin() + (first - begin), count, out);
  }
}

const GgufModel& gguf_model(const Model& model) {
  const auto* inside = dynamic_cast<const GgufModel*>(&model);
  if (inside == nullptr) throw Error(Status::kInvalidArgument, "this model was not made by Model::load");
  return *inside;
}

std::vector<Token> GgufModel::tokenize(std::string_view text, bool add_bos, bool special) const {
  const llama_vocab* vocab = llama_model_get_vocab(vocabulary_.get());
  bool bos = add_bos && llama_vocab_get_add_bos(vocab);
  if (bos && special) {  // chat templates and copied prompts begin with it themselves
    const std::string written = token_text(llama_vocab_bos(vocab));
    bos = written.empty() || !text.starts_with(written);
  }
  if (text.size() > (size_t{1} << 30))
    throw Error(Status::kInvalidArgument, "a text of more than 1 GiB cannot be tokenised at once");
  std::vector<Token> tokens(text.size() + 8);
  const size_t longest = longest_run(text);
  if (longest > kLongestRun) {
    throw Error(Status::kInvalidArgument, "the text has a run of " + std::to_string(longest) +
                                              " characters without a change between space and others, which tokenizers take "
                                              "apart by recursion; break it after at most " +
                                              std::to_string(kLongestRun));
  }
  const auto call = [&] {
    const LibraryCall guard;
    return llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), tokens.data(),
                          static_cast<int32_t>(tokens.size()), bos, special);
  };
  const auto run = [&] {
    try {
      if (longest <= kRunOnAnyStack) return call();
      int result = 0;
      run_on_stack(longest * kStackOfACharacter + (size_t{8} << 20), [&] { result = call(); });
      return result;
    } catch (const Error&) {
      throw;
    } catch (const std::bad_alloc&) {
      throw Error(Status::kOutOfMemory, file_.path() + ": not enough memory to tokenize " + std::to_string(text.size()) +
                                            " bytes of text; free some or give less text");
    } catch (const std::exception& e) {
      throw Error(Status::kUnsupported,
                  file_.path() + ": its tokenizer cannot take the text (" + e.what() + "); obtain the file again");
    }
  };
  int n = run();
  if (n < 0 && n != INT32_MIN) {  // more tokens than bytes: a space may become three byte tokens
    tokens.resize(static_cast<size_t>(-n));
    n = run();
  }
  if (n < 0) throw Error(Status::kInvalidArgument, "the text has more tokens than the tokenizer can count; give it in parts");
  tokens.resize(static_cast<size_t>(n));
  return tokens;
}

std::string GgufModel::token_text(Token token) const {
  const llama_vocab* vocab = llama_model_get_vocab(vocabulary_.get());
  if (token < 0 || token >= vocab_size())
    throw Error(Status::kInvalidArgument, "the vocabulary has no token " + std::to_string(token));
  std::string text(32, '\0');
  int n = llama_token_to_piece(vocab, token, text.data(), static_cast<int32_t>(text.size()), 0, true);
  if (n < 0) {
    text.resize(static_cast<size_t>(-n));
    n = llama_token_to_piece(vocab, token, text.data(), static_cast<int32_t>(text.size()), 0, true);
  }
  text.resize(static_cast<size_t>(std::max(n, 0)));
  return text;
}

std::string GgufModel::detokenize(std::span<const Token> tokens) const {
  std::string text;
  for (const Token token : tokens) text += token_text(token);
  return text;
}

bool GgufModel::is_end(Token token) const { return llama_vocab_is_eog(llama_model_get_vocab(vocabulary_.get()), token); }

Token GgufModel::bos() const { return llama_vocab_bos(llama_model_get_vocab(vocabulary_.get())); }

ChatTemplate GgufModel::chat_template() const {
  const char* source = llama_model_chat_template(vocabulary_.get(), nullptr);
  return {file_.path() + ": its chat template", source == nullptr ? "" : source};
}

// What stands for a control token, and only that: other tokens are found in plain text too.
std::vector<std::string> GgufModel::special_texts() const {
  const llama_vocab* vocab = llama_model_get_vocab(vocabulary_.get());
  std::vector<std::string> texts;
  for (Token t = 0; t < vocab_size(); ++t) {
    const int kind = llama_vocab_get_attr(vocab, t);
    if ((kind & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN)) != 0) texts.emplace_back(llama_vocab_get_text(vocab, t));
  }
  return texts;
}

std::vector<Token> GgufModel::chat_tokens(std::span<const ChatMessage> messages, const ChatTemplate& chat_template) const {
  const llama_vocab* vocab = llama_model_get_vocab(vocabulary_.get());
  const auto text_of = [&](Token t) { return t < 0 ? std::string() : token_text(t); };
  const SpecialText special(messages, special_texts());
  const auto rendered =
      render_chat(chat_template, special.marked(messages), text_of(llama_vocab_bos(vocab)), text_of(llama_vocab_eos(vocab)));
  std::vector<Token> tokens;
  for (const ChatPart& part : special.parts(rendered)) {
    const std::vector<Token> more = tokenize(part.text, tokens.empty(), !part.message);
    tokens.insert(tokens.end(), more.begin(), more.end());
  }
  return tokens;
}

}  // namespace kvmix
