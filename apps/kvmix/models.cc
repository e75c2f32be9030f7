#include "models.h"

#include <array>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "kvmix/error.h"

namespace kvmix::app {
namespace {

constexpr std::array<std::pair<const char*, const char*>, 3> kNames = {{
    {"smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"},
    {"gemma3", "gemma-3-270m-q4_k_m.gguf"},
    {"qwen2.5-coder", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"},
}};

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The same rule as scripts/models and cmake/LlamaCpp.cmake.
std::filesystem::path cache_folder() {
  if (const std::string own = variable("KVMIX_CACHE_DIR"); !own.empty()) return own;
  if (const std::string xdg = variable("XDG_CACHE_HOME"); !xdg.empty()) return std::filesystem::path(xdg) / "kvmix";
  return std::filesystem::path(variable("HOME")) / ".cache" / "kvmix";
}

}  // namespace

std::string model_path(const std::string& name) {
  for (const auto& [short_name, file] : kNames) {
    if (name != short_name || std::filesystem::exists(name)) continue;
    const auto path = cache_folder() / "models" / file;
    if (!std::filesystem::exists(path)) {
      throw Error(Status::kNotFound, name + " is not on this machine (" + path.string() + "): run scripts/models " + name);
    }
    return path.string();
  }
  if (name.find('/') == std::string::npos && !name.ends_with(".gguf") && !std::filesystem::exists(name)) {
    throw Error(Status::kNotFound,
                name + ": no such file, and scripts/models knows smollm2, gemma3 and qwen2.5-coder only; name a GGUF file");
  }
  return name;
}

std::shared_ptr<const Model> load_model(const std::string& name) { return Model::load(model_path(name)); }

}  // namespace kvmix::app
