// Model names that stand for files obtained by scripts/models.
#pragma once

#include <memory>
#include <string>

#include "kvmix/engine.h"

namespace kvmix::app {

inline constexpr const char* kModelHelp = "GGUF file, or a name that scripts/models obtains: smollm2, gemma3, qwen2.5-coder";

// A path as it is; a short name as the file in the cache folder. Throws kNotFound saying what to run.
std::string model_path(const std::string& name);
std::shared_ptr<const Model> load_model(const std::string& name);

}  // namespace kvmix::app
