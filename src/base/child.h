// Work whose course a file from outside decides, such as a template's, in a process of its own: whatever it does, this one goes
// on.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <string>

namespace kvmix {

struct ChildLimits {
  int seconds = 3;                   // of processor time
  size_t bytes = size_t{512} << 20;  // more memory than now
};

// What `work` returns, or nothing if it did not come to an end: it crashed, threw, or met a limit. It must not use other
// threads or locks that they may hold. Throws kIo if no process can be made.
std::optional<std::string> run_in_child(const std::function<std::string()>& work, const ChildLimits& limits);

}  // namespace kvmix
