// The one target of a program as libFuzzer's. With --seeds=FOLDER the program writes the target's seeds there and ends.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "fuzz/target.h"

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  constexpr std::string_view kSeeds = "--seeds=";
  for (int i = 1; i < *argc; ++i) {
    const std::string_view argument = (*argv)[i];
    if (!argument.starts_with(kSeeds)) continue;
    const std::filesystem::path folder = argument.substr(kSeeds.size());
    std::filesystem::create_directories(folder);
    size_t n = 0;
    for (const auto& seed : kvmix::fuzz::targets().front().seeds()) {
      std::ofstream file(folder / ("seed-" + std::to_string(n++)), std::ios::binary);
      file << seed.bytes;
      if (!file.flush()) std::abort();
    }
    std::exit(0);
  }
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    kvmix::fuzz::targets().front().accepts(std::string(reinterpret_cast<const char*>(data), size));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    std::abort();
  }
  return 0;
}
