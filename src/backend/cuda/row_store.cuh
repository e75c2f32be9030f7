// Rows to slots of open pages, fp16 or codes, and the numbers of records. A warp holds rows of one head, lane l channels l,
// l + 32, ... For a file that is compiled without fused multiply-adds, unless it only reads.
#pragma once

#include "backend/cuda/row_codes.cuh"
#include "base/cuda/async_copy.cuh"
#include "codec/cuda/pick.h"
#include "codec/cuda/trellis_tables.cuh"

namespace kvmix::cuda {

inline constexpr int kFeedbackWarps = 4, kFeedbackThreads = 32 * kFeedbackWarps;  // of a block that rounds with feedback

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % 32; }

// What a warp feeds errors back with, in shared memory; nothing where it does not.
template <int dim, int rows>
struct Feedback {
  const float* panels = nullptr;
  FeedbackRoom<dim, rows>* room = nullptr;
};
template <int dim, int rows>
struct FeedbackSpace {
  static constexpr int panel_bytes = feedback_panel(dim, dim) * 4;
  static constexpr int bytes = panel_bytes + kFeedbackWarps * static_cast<int>(sizeof(FeedbackRoom<dim, rows>));
};
// Begins to bring a head's panels; wait_panels waits for them, with the block.
template <int dim, int rows>
__device__ inline Feedback<dim, rows> bring_panels(uint8_t* shared, const float* panels) {
  using Space = FeedbackSpace<dim, rows>;
  for (int at = static_cast<int>(threadIdx.x) * 16; at < Space::panel_bytes; at += kFeedbackThreads * 16) {
    copy_async(shared + at, reinterpret_cast<const uint8_t*>(panels) + at);
  }
  commit_copies();
  auto* const rooms = reinterpret_cast<FeedbackRoom<dim, rows>*>(shared + Space::panel_bytes);
  return {reinterpret_cast<const float*>(shared), rooms + threadIdx.x / 32};
}
__device__ inline void wait_panels() {
  wait_copies<0>();
  __syncthreads();
}

// Rows of one head and side as an open page stores them, fp16 or codes: row r to `to[r]`, unless that is null.
struct OpenSlot {
  uint8_t* page = nullptr;
  int slot = 0, slots = 0;
  bool rows = false;  // fp16 rows next to each other
};
template <int dim, int rows, bool key>
__device__ inline void store_rows(float (&x)[rows][dim / 32], const RecordShape& open, const OpenSlot (&to)[rows],
                                  const Feedback<dim, rows>& feedback) {
  const int lane = lane_of();
  const SideShape side = key ? open.key() : open.value();
  const int part = key ? kHeaderBytes : open.key_bytes();
  bool coded = false;
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (to[r].page == nullptr) continue;
    if (to[r].rows) {
      auto* const halves = reinterpret_cast<__half*>(to[r].page) + ((key ? 0 : to[r].slots) + to[r].slot) * dim;
#pragma unroll
      for (int i = 0; i < dim / 32; ++i) halves[32 * i + lane] = __float2half_rn(x[r][i]);
    } else if (side.bits == 16) {
      store_halves<dim, key>(x[r], to[r].slot, lane, to[r].page + part);
    } else {
      coded = true;
    }
  }
  if (!coded) return;
  RowCodes<dim, rows> codes;
  codes.encode(x, side.group, lane);
  if constexpr (key) {
    if (feedback.room != nullptr) codes.feed_back(x, feedback.panels, *feedback.room, lane);
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (to[r].page != nullptr && !to[r].rows) codes.template store<key>(r, side, to[r].slot, lane, to[r].page + part);
  }
}

// The number of an element of a record's side, as Codec::decode gives it: of trellis codes, whose keys stand behind the
// record's header. A call, so that kernels keep the registers that they have without it.
static __device__ __noinline__ float trellis_number(const SideShape& side, bool key, const uint8_t* part, int token,
                                                    int channel) {
  const int bits = code_bits(side.bits), window = stream_window(part, bits, key, token, channel);
  const uint8_t* const scales = part + side.meta();
  const float scale = trellis_scale_of(scales[channel / kTrellisGroup * kPageTokens + trellis_scale_slot(key, token)]);
  const float level = static_cast<float>(kTrellisTables.twice[bits - kTrellisBits.front()][window]) * 0.5f - kLevelCentre;
  if (!key) return __fmul_rn(scale, level);
  const auto stored = static_cast<int8_t>(scales[side.groups() * kPageTokens + trellis_offset_slot(channel)]);
  return __fadd_rn(__fmul_rn(scale, level), __fmul_rn(static_cast<float>(stored), trellis_key_unit(part)));
}

// Of other codes.
__device__ inline float even_number(const SideShape& side, bool key, const uint8_t* part, int token, int channel) {
  const CodeCell cell = code_cell(key, token, channel);
  const auto bit_half = [&](const CodePlace& place) {
    return code_half(reinterpret_cast<const uint16_t*>(part), side.bits, cell.block, cell.at, place.word);
  };
  const auto float_of = [](uint16_t h) { return __half2float(__ushort_as_half(h)); };
  if (side.bits == 16) return float_of(bit_half(code_bit_place(16, cell.at.reg, cell.field, 0)));
  int code = 0;
  if (side.bits == 3 && cell.field == 7 && cell.at.reg >= 2) {  // the one code that is not in a piece
    for (int b = 0; b < side.bits; ++b) {
      const CodePlace place = code_bit_place(side.bits, cell.at.reg, cell.field, b);
      code |= (bit_half(place) >> place.bit & 1) << b;
    }
  } else {
    const CodePlace place = code_place(side.bits, cell.at.reg, cell.field);
    code = bit_half(place) >> place.bit & ((1 << side.bits) - 1);
  }
  const auto* const scales = reinterpret_cast<const uint16_t*>(part + side.meta()) + side.scale_at(token, channel);
  const float centre = static_cast<float>((1 << side.bits) - 1) * 0.5f;
  return __fadd_rn(float_of(scales[kMidStep]), __fmul_rn(float_of(scales[0]), static_cast<float>(code) - centre));
}
// Calls body with the function of a token and a channel that gives their number, chosen once by the side's kind of codes, so
// that loads of many numbers go together.
template <class Body>
__device__ inline void with_numbers(const SideShape& side, bool key, const uint8_t* part, const Body& body) {
  if (side.trellis()) {
    body([&](int token, int channel) { return trellis_number(side, key, part, token, channel); });
  } else {
    body([&](int token, int channel) { return even_number(side, key, part, token, channel); });
  }
}

}  // namespace kvmix::cuda
