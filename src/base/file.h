// Files written whole or not at all.
#pragma once

#include <cstdio>
#include <string>

namespace kvmix {

// Writes to PATH.tmp-PID; commit() syncs and renames, otherwise the destructor removes it. Throws kIo naming path and cause.
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();

 private:
  [[noreturn]] void fail(const char* action) const;

  std::string path_, temporary_;
  std::FILE* file_ = nullptr;
};

// The whole file as bytes. Throws kNotFound or kIo; kInvalidArgument beyond max_bytes.
std::string read_file(const std::string& path, size_t max_bytes);

}  // namespace kvmix
