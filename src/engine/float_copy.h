// A model with every tensor in fp32, as a file: products then round no activations, so that two runs differ only by what was
// changed between them.
#pragma once

#include <string>

namespace kvmix {

class FloatCopy {
 public:
  // Writes the copy of the GGUF file `source` into the system's temporary folder; it is removed with this object. Throws kIo
  // if it cannot be written (it takes 4 bytes a weight), kCorrupt if the source cannot be read.
  explicit FloatCopy(const std::string& source);
  ~FloatCopy();
  FloatCopy(const FloatCopy&) = delete;
  FloatCopy& operator=(const FloatCopy&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace kvmix
