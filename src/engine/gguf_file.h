// A model's GGUF: one file, or the parts NAME-00001-of-0000N.gguf that a large model is split into, whichever of them is named.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <memory>
#include <string>
#include <vector>

namespace kvmix {

// A file mapped for reading.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  char* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

class GgufFile {
 public:
  struct Tensor {
    std::string name;
    const ggml_tensor* shape;  // its type and dimensions; without data
    char* data;                // in the mapped file
    size_t bytes, part;
  };

  // Throws kNotFound, kIo, kCorrupt, or kUnsupported for a file of another kind (adapter, projector, vocabulary alone).
  explicit GgufFile(const std::string& path);
  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const { return path_; }  // the first part, which has the metadata
  const gguf_context* metadata() const;
  const std::vector<Tensor>& tensors() const { return tensors_; }
  size_t parts() const { return parts_.size(); }
  const MappedFile& mapped(size_t part) const;

 private:
  struct Part;
  void open(const std::string& path);
  void open_other_parts(const std::string& named);

  std::string path_;
  std::vector<std::unique_ptr<Part>> parts_;
  std::vector<Tensor> tensors_;
};

}  // namespace kvmix
