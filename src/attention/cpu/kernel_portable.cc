// The portable kernel: plain C++, every codec of every family, and every shape. A tile is decoded to fp32 once for all query
// rows of the job.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/cpu/kernel.h"
#include "base/fp16.h"

namespace kvmix {
namespace {

struct Buffers {
  float* tile;    // [kPageTokens][width] of the side in hand
  float* scores;  // [rows][kPageTokens]
};

constexpr int kLanes = 16;  // sums of a dot product side by side

size_t tile_floats(int width) { return static_cast<size_t>(kPageTokens) * static_cast<size_t>(width); }

// Live rows of one side of a page as floats; rows behind them are zero, whatever the memory holds.
void load_rows(const PageRef& page, const TileFormat& format, const std::byte* data, float* tile) {
  if (page.packed) {
    codec_of(format.spec).decode(format.spec, format.shape(), data, tile);
  } else {
    for (int i = 0; i < page.live * format.width; ++i) {
      uint16_t h;
      std::memcpy(&h, data + static_cast<size_t>(i) * 2, 2);
      tile[i] = f16_to_f32(h);
    }
  }
}

void attend_page(const AttendJob& job, const PageRef& page, const Buffers& buffers) {
  const int key_width = job.key.width, value_width = job.value.width;
  load_rows(page, job.key, page.key, buffers.tile);
  for (int r = 0; r < job.rows; ++r) {
    const float* q = job.q + static_cast<ptrdiff_t>(r) * key_width;
    float* scores = buffers.scores + static_cast<ptrdiff_t>(r) * kPageTokens;
    const int64_t last = job.position[r], first = job.sliding_window > 0 ? last - job.sliding_window + 1 : 0;
    for (int t = 0; t < page.live; ++t) {
      const int64_t position = page.first_position + t;
      if (position > last || position < first) {
        scores[t] = -INFINITY;
        continue;
      }
      const float* k = buffers.tile + static_cast<ptrdiff_t>(t) * key_width;
      static_assert(kWidthStep % kLanes == 0);
      float lanes[kLanes] = {};
      for (int i = 0; i < key_width; i += kLanes) {
        for (int j = 0; j < kLanes; ++j) lanes[j] += q[i + j] * k[i + j];
      }
      float sum = 0;
      for (const float lane : lanes) sum += lane;
      sum *= job.scale;
      scores[t] = job.softcap > 0 ? job.softcap * std::tanh(sum / job.softcap) : sum;
    }
  }
  load_rows(page, job.value, page.value, buffers.tile);
  for (int r = 0; r < job.rows; ++r) {
    float* scores = buffers.scores + static_cast<ptrdiff_t>(r) * kPageTokens;
    float* acc = job.acc + static_cast<ptrdiff_t>(r) * value_width;
    const float top = *std::max_element(scores, scores + page.live);
    if (top == -INFINITY) continue;
    if (top > job.m[r]) {
      const float shrink = job.m[r] == -INFINITY ? 0.0f : std::exp(job.m[r] - top);
      job.l[r] *= shrink;
      for (int i = 0; i < value_width; ++i) acc[i] *= shrink;
      job.m[r] = top;
    }
    float* weights = page.weights == nullptr ? nullptr : page.weights + static_cast<ptrdiff_t>(r) * kPageTokens;
    if (weights != nullptr) {
      std::fill_n(weights, kPageTokens, 0.0f);
      page.reference[r] = job.m[r];
    }
    for (int t = 0; t < page.live; ++t) {
      if (scores[t] == -INFINITY) continue;
      const float p = std::exp(scores[t] - job.m[r]);
      if (weights != nullptr) weights[t] = p;
      job.l[r] += p;
      const float* v = buffers.tile + static_cast<ptrdiff_t>(t) * value_width;
      for (int i = 0; i < value_width; ++i) acc[i] += p * v[i];
    }
  }
}

bool available() { return true; }
bool supports(const AttendJob&) { return true; }

size_t scratch_bytes(int width, int rows) {
  return (tile_floats(width) + static_cast<size_t>(rows) * kPageTokens) * sizeof(float);
}

void attend(const AttendJob& job, std::byte* scratch) {
  Buffers buffers{};
  buffers.tile = reinterpret_cast<float*>(scratch);
  buffers.scores = buffers.tile + tile_floats(std::max(job.key.width, job.value.width));
  std::fill_n(job.m, job.rows, -INFINITY);
  std::fill_n(job.l, job.rows, 0.0f);
  std::fill_n(job.acc, static_cast<ptrdiff_t>(job.rows) * job.value.width, 0.0f);
  for (const PageRef& page : job.pages) {
    if (page.live > 0) attend_page(job, page, buffers);
  }
}

}  // namespace

extern const AttentionKernel kPortableKernel;
const AttentionKernel kPortableKernel = {
    "portable", "plain C++, fp32; every codec and shape", available, supports, scratch_bytes, attend};

}  // namespace kvmix
