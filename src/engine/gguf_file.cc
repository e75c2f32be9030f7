#include "engine/gguf_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <set>
#include <string_view>

#include "engine/architecture.h"
#include "engine/library_call.h"
#include "engine/model.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr int64_t kMostParts = 99999;  // five digits

std::string part_path(const std::string& prefix, int64_t index, int64_t count) {
  char ending[64];
  std::snprintf(ending, sizeof ending, "-%05lld-of-%05lld.gguf", static_cast<long long>(index + 1),
                static_cast<long long>(count));
  return prefix + ending;
}

void check_start(const std::string& path, const MappedFile& file) {
  if (file.bytes() < 8 || std::memcmp(file.data(), "GGUF", 4) != 0)
    throw Error(Status::kCorrupt, path + " is not a GGUF file; give a model in GGUF format");
  uint32_t version = 0;
  std::memcpy(&version, file.data() + 4, sizeof version);
  if (version == 1) {
    throw Error(Status::kUnsupported, path + " is of GGUF version 1, which ggml does not read; convert the model again");
  }
  if (version != 0 && (version & 0xffff) == 0) {
    throw Error(Status::kUnsupported,
                path + " is big-endian; convert the model for little-endian machines, or obtain such a file");
  }
}

// What is GGUF and no language model.
void check_kind(const GgufMetadata& metadata, size_t tensors) {
  const auto refuse = [&](const std::string& kind) {
    throw Error(Status::kUnsupported, metadata.path() + " is " + kind + "; give the model's own file");
  };
  const std::string type = metadata.text_or("general.type", "model");
  if (type == "adapter") refuse("an adapter (LoRA), which is used together with a model");
  if (type == "imatrix") refuse("an importance matrix, not a model");
  if (type == "mmproj" || metadata.text_or("general.architecture", "") == "clip")
    refuse("a projector of images or sound (mmproj)");
  if (tensors == 0 && metadata.has("tokenizer.ggml.model")) refuse("a vocabulary without weights");
  if (tensors == 0) refuse("without weights");
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw Error(Status::kNotFound, path + ": " + std::strerror(errno) + "; check the path");
  struct stat info {};
  const bool regular = fstat(descriptor, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0;
  void* data = regular ? mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, descriptor, 0) : MAP_FAILED;
  close(descriptor);
  if (!regular) throw Error(Status::kCorrupt, path + " is empty or not a regular file; give a GGUF file");
  if (data == MAP_FAILED)
    throw Error(Status::kIo, path + ": cannot map: " + std::strerror(errno) + "; free memory or check the file");
  data_ = static_cast<char*>(data);
  bytes_ = static_cast<size_t>(info.st_size);
}

MappedFile::~MappedFile() { munmap(data_, bytes_); }

struct GgufFile::Part {
  explicit Part(const std::string& path) : file(path) {}
  MappedFile file;
  GgufContext gguf;
  GgmlContext shapes;
};

GgufFile::GgufFile(const std::string& path) : path_(path) {
  open(path);
  open_other_parts(path);
  check_kind(GgufMetadata(metadata(), path_), tensors_.size());
  std::set<std::string_view> names;
  for (const Tensor& t : tensors_) {
    if (!names.insert(t.name).second)
      throw Error(Status::kCorrupt, path_ + ": tensor " + t.name + " is there twice; obtain the file again");
  }
}

GgufFile::~GgufFile() = default;

const gguf_context* GgufFile::metadata() const { return parts_.front()->gguf.get(); }
const MappedFile& GgufFile::mapped(size_t part) const { return parts_[part]->file; }

void GgufFile::open(const std::string& path) {
  auto part = std::make_unique<Part>(path);
  check_start(path, part->file);
  const LibraryCall call;
  ggml_context* shapes = nullptr;
  part->gguf.reset(gguf_init_from_file(path.c_str(), {true, &shapes}));
  part->shapes.reset(shapes);
  if (part->gguf == nullptr || shapes == nullptr) {
    throw Error(Status::kCorrupt, path + ": damaged or truncated GGUF header (" + call.reason("its reader gives no reason") +
                                      "); obtain the file again");
  }
  const gguf_context* gguf = part->gguf.get();
  const size_t start = gguf_get_data_offset(gguf), size = part->file.bytes();
  for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
    const std::string name = gguf_get_tensor_name(gguf, i);
    const ggml_tensor* shape = ggml_get_tensor(shapes, name.c_str());
    const size_t bytes = ggml_nbytes(shape), offset = gguf_get_tensor_offset(gguf, i);
    if (start > size || offset > size - start || bytes > size - start - offset) {
      throw Error(Status::kCorrupt,
                  path + ": tensor " + name + " reaches beyond the end of the truncated file; obtain it again");
    }
    tensors_.push_back({name, shape, part->file.data() + start + offset, bytes, parts_.size()});
  }
  parts_.push_back(std::move(part));
}

void GgufFile::open_other_parts(const std::string& named) {
  const GgufMetadata own(metadata(), named);
  const int64_t count = own.integer_or("split.count", 1, 0, kMostParts);
  if (count <= 1) return;
  const int64_t index = own.integer("split.no", 0, count - 1);
  const std::string ending = part_path("", index, count);
  if (!named.ends_with(ending)) {
    throw Error(Status::kCorrupt, named + " is part " + std::to_string(index + 1) + " of " + std::to_string(count) +
                                      " of a split model and its name should end in " + ending +
                                      "; rename it and its other parts");
  }
  const std::string prefix = named.substr(0, named.size() - ending.size());
  parts_.clear();
  tensors_.clear();
  path_ = part_path(prefix, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    const std::string path = part_path(prefix, i, count);
    if (access(path.c_str(), F_OK) != 0) {
      throw Error(Status::kNotFound, path + " is missing: " + named + " is part of a model in " + std::to_string(count) +
                                         " files, which must stand in one folder");
    }
    open(path);
    const GgufMetadata part(parts_.back()->gguf.get(), path);
    if (part.integer("split.no", 0, kMostParts) != i || part.integer("split.count", 0, kMostParts) != count) {
      throw Error(Status::kCorrupt,
                  path + ": its split.no and split.count say that it is another part; obtain the files again");
    }
  }
  const GgufMetadata first(metadata(), path_);
  const auto tensors = static_cast<int64_t>(tensors_.size());
  if (first.integer_or("split.tensors.count", tensors, 0, INT32_MAX) != tensors) {
    throw Error(Status::kCorrupt, path_ + ": the parts have " + std::to_string(tensors) +
                                      " tensors and split.tensors.count says another number; obtain the files again");
  }
}

}  // namespace kvmix
