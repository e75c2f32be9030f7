// What the numbers of trellis codes are looked up in on the device (codec/trellis_code.h).
#pragma once

#include <array>
#include <cstdint>

#include "codec/cuda/trellis_layout.h"
#include "codec/trellis_code.h"

namespace kvmix::cuda {

// Each window's level.
struct alignas(kLevels) LevelTables {  // read 8 bytes at a time
  std::array<uint8_t, kLevels> of[kTrellisBits.size()];
};
constexpr LevelTables level_tables() {
  LevelTables tables{};
  for (size_t i = 0; i < kTrellisBits.size(); ++i) tables.of[i] = level_table(kTrellisBits[i]);
  return tables;
}
static __device__ const LevelTables kLevelTables = level_tables();

// Twice each window's level, so that behind the byte 0x60 it is the fp16 number 512 + level. A table of so many bytes starts at
// a multiple of them.
struct alignas(kLevels) TrellisTables {
  uint8_t twice[kTrellisBits.size()][kLevels];
};
constexpr TrellisTables make_trellis_tables() {
  TrellisTables tables{};
  for (size_t i = 0; i < kTrellisBits.size(); ++i) {
    for (int window = 0; window < kLevels; ++window) {
      tables.twice[i][window] = static_cast<uint8_t>(2 * trellis_code(kTrellisBits[i]).level(window));
    }
  }
  return tables;
}
static __device__ const TrellisTables kTrellisTables = make_trellis_tables();

__device__ inline float trellis_scale_of(uint32_t stored) {
  return stored == 0 ? 0.0f : __uint_as_float(kScaleBase + (stored << kScaleShift));
}

// What a record's key offsets count in; its keys stand behind the header.
__device__ inline float trellis_key_unit(const uint8_t* keys) {
  return trellis_scale_of(static_cast<uint32_t>(__ldg(&reinterpret_cast<const RecordHeader*>(keys - kHeaderBytes)->key_unit)));
}

}  // namespace kvmix::cuda
