#include "engine/float_copy.h"

#include <ggml.h>
#include <gguf.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <system_error>

#include "engine/model.h"
#include "kvmix/error.h"

namespace kvmix {

FloatCopy::FloatCopy(const std::string& source) {
  ggml_context* read = nullptr;
  const GgufContext from(gguf_init_from_file(source.c_str(), {false, &read}));
  const GgmlContext data(read);
  if (!from) throw Error(Status::kCorrupt, source + " cannot be read as GGUF");
  const GgufContext to(gguf_init_empty());
  gguf_set_kv(to.get(), from.get());
  const int64_t n = gguf_get_n_tensors(from.get());
  size_t bytes = 0;
  for (ggml_tensor* t = ggml_get_first_tensor(read); t != nullptr; t = ggml_get_next_tensor(read, t)) {
    bytes += static_cast<size_t>(ggml_nelements(t)) * sizeof(float) + 64 + ggml_tensor_overhead();
  }
  const GgmlContext wide(ggml_init({bytes + static_cast<size_t>(n + 1) * 256, nullptr, false}));
  for (int64_t i = 0; i < n; ++i) {
    const char* name = gguf_get_tensor_name(from.get(), i);
    const ggml_tensor* t = ggml_get_tensor(read, name);
    ggml_tensor* w = ggml_new_tensor(wide.get(), GGML_TYPE_F32, ggml_n_dims(t), t->ne);
    ggml_set_name(w, name);
    if (t->type == GGML_TYPE_F32) {
      std::memcpy(w->data, t->data, ggml_nbytes(t));
    } else {
      ggml_get_type_traits(t->type)->to_float(t->data, static_cast<float*>(w->data), ggml_nelements(t));
    }
    gguf_add_tensor(to.get(), w);
  }
  std::string pattern = (std::filesystem::temp_directory_path() / "kvmix-float-XXXXXX").string();
  const int file = mkstemp(pattern.data());
  if (file < 0) throw Error(Status::kIo, "cannot create " + pattern + ": " + std::strerror(errno) + "; set TMPDIR");
  close(file);
  path_ = pattern;
  if (!gguf_write_to_file(to.get(), path_.c_str(), false)) {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
    throw Error(Status::kIo, "cannot write " + path_ + " (" + std::to_string(bytes >> 20) + " MiB); free space or set TMPDIR");
  }
}

FloatCopy::~FloatCopy() {
  std::error_code ignored;
  std::filesystem::remove(path_, ignored);
}

}  // namespace kvmix
