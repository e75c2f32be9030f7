// What ggml and libllama say and do inside one call: their log is silent, but the reason of a failure is kept, and an assertion
// of theirs becomes an Error instead of the end of the process.
#pragma once

#include <string>

namespace kvmix {

class LibraryCall {
 public:
  LibraryCall();  // of this thread, until it goes out of scope; calls nest
  ~LibraryCall();
  LibraryCall(const LibraryCall&) = delete;
  LibraryCall& operator=(const LibraryCall&) = delete;

  // The first error that the library logged, in one line without its prefixes; `otherwise` if it gave none.
  std::string reason(const std::string& otherwise) const;

 private:
  friend struct LibraryHandlers;
  LibraryCall* outer_;
  std::string errors_;
};

}  // namespace kvmix
