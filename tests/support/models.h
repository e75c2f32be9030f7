// The real models that tests run on, and text for them.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include "kvmix/engine.h"

namespace kvmix::testing {

// "smollm2" or "gemma3": the file that scripts/models obtains. Throws saying so if it is not there.
inline std::string model_file(const std::string& name) {
  const std::string file = name == "smollm2" ? "SmolLM2-135M-Instruct.Q4_1.gguf" : "gemma-3-270m-q4_k_m.gguf";
  const auto env = [](const char* key) { return std::getenv(key) != nullptr ? std::string(std::getenv(key)) : std::string(); };
  std::string cache = env("KVMIX_CACHE_DIR");
  if (cache.empty()) cache = (env("XDG_CACHE_HOME").empty() ? env("HOME") + "/.cache" : env("XDG_CACHE_HOME")) + "/kvmix";
  const std::string path = cache + "/models/" + file;
  if (!std::filesystem::exists(path)) throw std::runtime_error(path + " is missing: run scripts/models");
  return path;
}

// Varied text of the project's own, long enough for `n` tokens: short scenes with changing subjects, so that no long stretch
// repeats word for word.
inline std::string long_text(size_t paragraphs) {
  const std::vector<std::string> who = {"The miller",  "A pilot",         "My neighbour", "The old botanist",
                                        "Her brother", "The night guard", "A young clerk"};
  const std::vector<std::string> verb = {"carried",  "measured", "forgot",  "repaired", "described",
                                         "borrowed", "painted",  "counted", "sold"};
  const std::vector<std::string> what = {"eleven copper pipes", "the second ledger",    "a map of the harbour",
                                         "three wet coats",     "the broken clock",     "a list of birds",
                                         "the blue lantern",    "two letters from Oslo"};
  const std::vector<std::string> where = {"near the railway bridge", "in the cold kitchen", "behind the theatre",
                                          "at the edge of the moor", "on the fourth floor"};
  const std::vector<std::string> then = {"because the rain would not stop.",
                                         "and nobody asked why.",
                                         "while the radio played softly.",
                                         "before the shops had opened.",
                                         "although the doctor had advised against it.",
                                         "so the others had to wait until evening."};
  std::string text;
  for (size_t p = 0; p < paragraphs; ++p) {
    for (size_t s = 0; s < 5; ++s) {
      const size_t k = p * 31 + s * 17;
      text += who[(k * 7 + p) % who.size()] + " " + verb[(k * 5 + s) % verb.size()] + " " +
              what[(k * 3 + p / 2) % what.size()] + " " + where[(k + s * s) % where.size()] + " " +
              then[(k * 11 + p * s) % then.size()] + " ";
    }
    text += "\n\n";
  }
  return text;
}

inline std::vector<Token> long_text_tokens(const Model& model, size_t n) {
  std::vector<Token> tokens = model.tokenize(long_text(n / 40), true);
  if (tokens.size() < n) throw std::runtime_error("the test text is too short");
  tokens.resize(n);
  return tokens;
}

}  // namespace kvmix::testing
