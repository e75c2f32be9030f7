#include "engine/library_call.h"

#include <ggml.h>
#include <llama.h>

#include <cstdio>
#include <mutex>
#include <string_view>

#include "engine/model.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kMostKept = 4096;
thread_local LibraryCall* current = nullptr;

}  // namespace

struct LibraryHandlers {
  static void log(ggml_log_level level, const char* text, void*) {
    if (current != nullptr && level == GGML_LOG_LEVEL_ERROR && current->errors_.size() < kMostKept) current->errors_ += text;
  }
  static void assertion(const char* message) {
    if (current != nullptr) {
      // What ggml asserts of the room that it asked for.
      const bool memory = std::string_view(message).find("mem_buffer != NULL") != std::string_view::npos;
      throw Error(memory ? Status::kOutOfMemory : Status::kUnsupported,
                  std::string(memory ? "not enough memory: " : "libllama cannot go on: ") + message);
    }
    std::fprintf(stderr, "%s\n", message);
  }
};

void quiet_libraries() {
  static std::once_flag once;
  std::call_once(once, [] {
    ggml_log_set(LibraryHandlers::log, nullptr);
    llama_log_set(LibraryHandlers::log, nullptr);
    ggml_set_abort_callback(LibraryHandlers::assertion);
    llama_backend_init();
  });
}

LibraryCall::LibraryCall() : outer_(current) {
  quiet_libraries();
  current = this;
}

LibraryCall::~LibraryCall() { current = outer_; }

std::string LibraryCall::reason(const std::string& otherwise) const {
  std::string_view line(errors_);
  line = line.substr(0, line.find('\n'));
  // "llama_model_load: error loading model: error loading model vocabulary: unknown pre-tokenizer type: 'x'"
  if (const size_t colon = line.find(": "); colon != std::string_view::npos && line.find(' ') > colon)
    line.remove_prefix(colon + 2);
  for (const std::string_view prefix : {"error loading model: ", "error loading model vocabulary: "}) {
    if (line.starts_with(prefix)) line.remove_prefix(prefix.size());
  }
  return line.empty() ? otherwise : std::string(line);
}

}  // namespace kvmix
