#include "engine/gguf_check.h"

#include <ggml-cpu.h>

#include <cctype>
#include <cstdint>
#include <string_view>
#include <unordered_set>

#include "kvmix/error.h"

namespace kvmix {
namespace {

[[noreturn]] void corrupt(const std::string& path, const std::string& what) {
  throw Error(Status::kCorrupt, path + ": " + what + "; obtain the file again");
}

bool is_byte_text(std::string_view text) {
  return text.size() == 6 && text.starts_with("<0x") && text.back() == '>' &&
         std::isxdigit(static_cast<unsigned char>(text[3])) != 0 && std::isxdigit(static_cast<unsigned char>(text[4])) != 0;
}

}  // namespace

void check_tokenizer(const gguf_context* gguf, const std::string& path) {
  const int64_t model = gguf_find_key(gguf, "tokenizer.ggml.model");
  if (model < 0 || gguf_get_kv_type(gguf, model) != GGUF_TYPE_STRING)
    corrupt(path, "tokenizer.ggml.model is missing or not text");
  const std::string_view kind = gguf_get_val_str(gguf, model);
  if (kind != "llama" && kind != "gpt2") {
    throw Error(Status::kUnsupported,
                path + ": tokenizer \"" + std::string(kind.substr(0, 32)) + "\" is not supported; llama and gpt2 are");
  }
  const int64_t list = gguf_find_key(gguf, "tokenizer.ggml.tokens");
  if (list < 0 || gguf_get_kv_type(gguf, list) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, list) != GGUF_TYPE_STRING) {
    corrupt(path, "tokenizer.ggml.tokens is missing or not a list of texts");
  }
  const size_t n = gguf_get_arr_n(gguf, list);
  const int64_t type_list = gguf_find_key(gguf, "tokenizer.ggml.token_type");
  const int32_t* types = nullptr;
  if (type_list >= 0) {
    if (gguf_get_kv_type(gguf, type_list) != GGUF_TYPE_ARRAY || gguf_get_arr_type(gguf, type_list) != GGUF_TYPE_INT32 ||
        gguf_get_arr_n(gguf, type_list) != n) {
      corrupt(path, "tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens");
    }
    types = static_cast<const int32_t*>(gguf_get_arr_data(gguf, type_list));
  }
  std::unordered_set<std::string_view> seen;
  seen.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    const std::string_view text = gguf_get_arr_str(gguf, list, i);
    // libllama gives empty texts names of their own.
    if (text.starts_with("[EMPTY_") || (!text.empty() && !seen.insert(text).second)) {
      corrupt(path, "token " + std::to_string(i) + " of tokenizer.ggml.tokens has the text of another");
    }
    if (types != nullptr && types[i] == LLAMA_TOKEN_TYPE_BYTE && (kind != "llama" || !is_byte_text(text))) {
      corrupt(path, "token " + std::to_string(i) + " of tokenizer.ggml.tokens is marked as a byte and is none");
    }
  }
}

void check_special_tokens(const llama_vocab* vocab, const std::string& path) {
  if (llama_vocab_get_add_bos(vocab) && llama_vocab_bos(vocab) < 0) {
    corrupt(path, "tokenizer.ggml.add_bos_token is set and tokenizer.ggml.bos_token_id names no token");
  }
  if (llama_vocab_get_add_eos(vocab) && llama_vocab_eos(vocab) < 0) {
    corrupt(path, "tokenizer.ggml.add_eos_token is set and tokenizer.ggml.eos_token_id names no token");
  }
}

void check_matrix_type(const ggml_tensor* tensor, const std::string& path) {
  const bool multiplies = ggml_get_type_traits_cpu(tensor->type)->vec_dot != nullptr;
  const bool looks_up = tensor->type == GGML_TYPE_F32 || ggml_get_type_traits(tensor->type)->to_float != nullptr;
  if (!multiplies || !looks_up) {
    throw Error(Status::kUnsupported, path + ": tensor " + ggml_get_name(tensor) + " is stored as " +
                                          ggml_type_name(tensor->type) +
                                          ", which ggml cannot multiply by; obtain the file again");
  }
}

void check_vector_type(const ggml_tensor* tensor, const std::string& path) {
  if (tensor->type != GGML_TYPE_F32) {
    throw Error(Status::kUnsupported, path + ": tensor " + ggml_get_name(tensor) + " is stored as " +
                                          ggml_type_name(tensor->type) + "; vectors must be f32, obtain the file again");
  }
}

}  // namespace kvmix
