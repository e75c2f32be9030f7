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
  const GgufFile from(source);
  const GgufContext to(gguf_init_empty());
  gguf_set_kv(to.get(), from.metadata());
  for (const char* key : {"split.no", "split.count", "split.tensors.count"}) gguf_remove_key(to.get(), key);
  size_t bytes = 0;
  for (const GgufFile::Tensor& t : from.tensors())
    bytes += static_cast<size_t>(ggml_nelements(t.shape)) * sizeof(float) + 320 + ggml_tensor_overhead();
  const GgmlContext wide(ggml_init({bytes + 1024, nullptr, false}));
  if (wide == nullptr) throw Error(Status::kOutOfMemory, "not enough memory for a copy of " + source + " in fp32");
  for (const GgufFile::Tensor& t : from.tensors()) {
    ggml_tensor* w = ggml_new_tensor(wide.get(), GGML_TYPE_F32, ggml_n_dims(t.shape), t.shape->ne);
    ggml_set_name(w, t.name.c_str());
    if (t.shape->type == GGML_TYPE_F32) {
      std::memcpy(w->data, t.data, t.bytes);
    } else {
      ggml_get_type_traits(t.shape->type)->to_float(t.data, static_cast<float*>(w->data), ggml_nelements(t.shape));
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
