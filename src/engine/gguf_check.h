// What must hold of a GGUF before libllama builds its vocabulary and ggml computes with its weights: both end the process on
// input that breaks their assumptions, so those are checked here first; gguf's own reader checks the header. Errors name the
// file, the field and the remedy.
#pragma once

#include <ggml.h>
#include <gguf.h>
#include <llama.h>

#include <string>

namespace kvmix {

// Token texts and types, before libllama builds its vocabulary. Throws kCorrupt or kUnsupported.
void check_tokenizer(const gguf_context* gguf, const std::string& path);
// The special tokens that libllama would insert. Throws kCorrupt.
void check_special_tokens(const llama_vocab* vocab, const std::string& path);
// A weight of a type that ggml can multiply by and look rows up in. Throws kUnsupported.
void check_matrix_type(const ggml_tensor* tensor, const std::string& path);
// A norm, bias or frequency vector: fp32. Throws kUnsupported.
void check_vector_type(const ggml_tensor* tensor, const std::string& path);

}  // namespace kvmix
