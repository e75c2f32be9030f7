#include "kvmix/error.h"

namespace kvmix {

const char* status_name(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kInvalidArgument:
      return "invalid argument";
    case Status::kNotFound:
      return "not found";
    case Status::kCorrupt:
      return "corrupt";
    case Status::kMismatch:
      return "mismatch";
    case Status::kOutOfMemory:
      return "out of memory";
    case Status::kIo:
      return "input/output";
    case Status::kUnsupported:
      return "unsupported";
    case Status::kCancelled:
      return "cancelled";
    case Status::kInternal:
      return "internal";
  }
  return "unknown";
}

}  // namespace kvmix
