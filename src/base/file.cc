#include "base/file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "kvmix/error.h"

namespace kvmix {

void AtomicFile::fail(const char* action) const {
  throw Error(Status::kIo, path_ + ": cannot " + action + ": " + std::strerror(errno) + "; nothing was changed");
}

AtomicFile::AtomicFile(const std::string& path) : path_(path), temporary_(path + ".tmp-" + std::to_string(getpid())) {
  file_ = std::fopen(temporary_.c_str(), "wb");
  if (file_ == nullptr) fail("create the file");
}

AtomicFile::~AtomicFile() {
  if (file_ == nullptr) return;
  std::fclose(file_);
  std::remove(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  if (std::fwrite(data, 1, bytes, file_) != bytes) fail("write");
}

void AtomicFile::commit() {
  if (std::fflush(file_) != 0 || fsync(fileno(file_)) != 0) fail("write");
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail("rename the temporary over it");
  std::fclose(file_);
  file_ = nullptr;
}

std::string read_file(const std::string& path, size_t max_bytes) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) throw Error(Status::kNotFound, path + ": " + std::strerror(errno) + "; check the path");
  if (!S_ISREG(info.st_mode)) throw Error(Status::kInvalidArgument, path + " is not a regular file");
  if (static_cast<size_t>(info.st_size) > max_bytes) {
    throw Error(Status::kInvalidArgument, path + " has " + std::to_string(info.st_size) + " bytes, more than the " +
                                              std::to_string(max_bytes) + " that such a file can have");
  }
  std::FILE* file = std::fopen(path.c_str(), "rb");
  if (file == nullptr) throw Error(Status::kIo, path + ": cannot open: " + std::strerror(errno));
  std::string content(static_cast<size_t>(info.st_size), '\0');
  const size_t got = std::fread(content.data(), 1, content.size(), file);
  std::fclose(file);
  if (got != content.size())
    throw Error(Status::kIo, path + ": read " + std::to_string(got) + " of " + std::to_string(content.size()) + " bytes");
  return content;
}

}  // namespace kvmix
