// What must hold of a GGUF before ggml and libllama may read it: both end the process on input that breaks their
// assumptions, so those are checked here first. Errors name the file, the field and the remedy.
#pragma once

#include <ggml.h>
#include <gguf.h>
#include <llama.h>

#include <cstddef>
#include <string>

namespace kvmix {

// Header and metadata keys of a mapped file, before gguf_init_from_file. Throws kCorrupt.
void check_gguf_header(const char* data, size_t bytes, const std::string& path);
// Token texts and types, before libllama builds its vocabulary. Throws kCorrupt or kUnsupported.
void check_tokenizer(const gguf_context* gguf, const std::string& path);
// The special tokens that libllama would insert. Throws kCorrupt.
void check_special_tokens(const llama_vocab* vocab, const std::string& path);
// A weight of a type that ggml can multiply by and look rows up in. Throws kUnsupported.
void check_matrix_type(const ggml_tensor* tensor, const std::string& path);
// A norm, bias or frequency vector: fp32. Throws kUnsupported.
void check_vector_type(const ggml_tensor* tensor, const std::string& path);

}  // namespace kvmix
