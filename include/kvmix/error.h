// Errors. Inside the library every failure is a kvmix::Error; the C ABI (kvmix.h) turns it into a status code.
#pragma once

#include <stdexcept>
#include <string>

#include "kvmix/export.h"

namespace KVMIX_API kvmix {

enum class Status : int {
  kOk = 0,
  kInvalidArgument = 1,  // the caller passed something that can never work
  kNotFound = 2,         // a file, a name in a registry, a sequence
  kCorrupt = 3,          // a file whose content fails its checks
  kMismatch = 4,         // two valid things that do not belong together (a plan of another model)
  kOutOfMemory = 5,      // the pool's limit or the system's
  kIo = 6,               // the operating system refused a read or write (disk full, permission)
  kUnsupported = 7,      // valid, but not in this build or on this machine
  kCancelled = 8,        // the caller asked to stop
  kInternal = 9,         // a broken promise inside the library: please report
};

// Short lower-case name ("corrupt"); never null.
const char* status_name(Status status);

// `what()` is one line for a person: what is wrong, where, and what to do about it.
class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const { return status_; }

 private:
  Status status_;
};

}  // namespace kvmix
