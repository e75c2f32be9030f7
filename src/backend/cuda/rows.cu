// A warp takes a row of one head: lane l holds channels l, l + 32, ... Compiled without fused multiply-adds.
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "backend/cuda/layer_format.h"
#include "backend/cuda/row_codes.cuh"
#include "backend/cuda/rows.h"
#include "base/cuda/launch.h"
#include "codec/cuda/format.h"

namespace kvmix::cuda {
namespace {

constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;
constexpr int64_t kUnitBytes = static_cast<int64_t>(kPageUnit);

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int64_t row_of() { return static_cast<int64_t>(blockIdx.x) * kRowWarps + static_cast<int>(threadIdx.x) / 32; }

// Orthonormal Hadamard over the largest power of two that divides the width, as src/rows/hadamard.cc.
template <int dim>
__device__ inline void hadamard(float (&x)[dim / 32]) {
  constexpr int kPerLane = dim / 32, kBlock = dim & -dim;
  const int lane = lane_of();
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], step);
      x[i] = (lane & step) != 0 ? other - x[i] : x[i] + other;
    }
  }
#pragma unroll
  for (int step = 1; step < kBlock / 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((i & step) != 0) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b, x[i + step] = a - b;
    }
  }
  const float norm = 1.0f / sqrtf(static_cast<float>(kBlock));
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] *= norm;
}

// `room`: dim floats of shared memory of this warp.
template <int dim>
__device__ inline void apply(const RowOps& ops, int head, float (&x)[dim / 32], float* room) {
  const int lane = lane_of();
  const auto each = [&](const float* numbers, auto op) {
    if (numbers == nullptr) return;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) x[i] = op(x[i], __ldg(numbers + head * dim + 32 * i + lane));
  };
  each(ops.subtract, [](float a, float b) { return a - b; });
  each(ops.multiply, [](float a, float b) { return a * b; });
  each(ops.divide, [](float a, float b) { return a / b; });
  if (ops.hadamard) hadamard<dim>(x);
  each(ops.divide_after, [](float a, float b) { return a / b; });
  if (ops.matrix == nullptr) return;
  const float* const matrix = ops.matrix + static_cast<int64_t>(head) * dim * dim;
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) room[32 * i + lane] = x[i], x[i] = 0.0f;
  __syncwarp();
  for (int from = 0; from < dim; ++from) {
    const float v = room[from];
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) x[i] += v * __ldg(matrix + from * dim + 32 * i + lane);
  }
  __syncwarp();
}

// Rows of one head and side as an open page stores them, fp16 or codes: row r to `to[r]`, unless that is null.
struct OpenSlot {
  uint8_t* page = nullptr;
  int slot = 0, slots = 0;
  bool rows = false;  // fp16 rows next to each other
};
template <int dim, int rows, bool key, bool feedback>
__device__ inline void store_rows(float (&x)[rows][dim / 32], const RecordShape& open, const float* columns,
                                  const OpenSlot (&to)[rows]) {
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
  codes.encode(x, side.group);
  if constexpr (key && feedback) {
    if (columns != nullptr) codes.feed_back(x, columns, lane);
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (to[r].page != nullptr && !to[r].rows) codes.template store<key>(r, side, to[r].slot, lane, to[r].page + part);
  }
}

// A warp takes `rows` rows of a head: beside each other they hide what feedback waits for.
template <int dim, int rows, bool key, bool feedback>
__device__ inline void append(const AppendRows& job, int row0, int head, float* room) {
  const int lane = lane_of();
  float x[rows][dim / 32] = {};
  OpenSlot to[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int64_t row = row0 + r;
    if (row >= job.rows) break;
    const RowPlace place = job.places[row];
    const float* const from = (key ? job.k + row * job.k_stride : job.v + row * job.v_stride) + head * dim;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) x[r][i] = from[32 * i + lane];
    apply<dim>(key ? job.key : job.value, head, x[r], room);
    const PageTable& table = job.table;
    const bool sink = place.position < table.sinks;
    const int behind = place.position - table.sinks;
    const int page = sink ? 0 : behind / kPageTokens + (table.sinks > 0 ? 1 : 0);
    const int32_t id = table.ids[(static_cast<int64_t>(place.entry) * job.kv_heads + head) * table.stride + page];
    to[r] = {table.pages + static_cast<int64_t>(~id) * kUnitBytes, sink ? place.position : behind % kPageTokens,
             sink ? table.sinks : kPageTokens, sink || !job.open.has_codes()};
  }
  const float* const columns = feedback ? job.key_columns + static_cast<int64_t>(head) * dim * dim : nullptr;
  store_rows<dim, rows, key, feedback>(x, job.open, columns, to);
}

// Blocks of one head and side, so that they share what feedback reads.
template <int dim, int rows, bool feedback>
__global__ void __launch_bounds__(kRowThreads, feedback ? 2 : 4) append_kernel(const __grid_constant__ AppendRows job) {
  __shared__ float room[kRowWarps][dim];
  const int warp = static_cast<int>(threadIdx.x) / 32, row = (static_cast<int>(blockIdx.x) * kRowWarps + warp) * rows;
  if (row >= job.rows) return;
  if (blockIdx.z == 0) {
    append<dim, rows, true, feedback>(job, row, static_cast<int>(blockIdx.y), room[warp]);
  } else {
    append<dim, rows, false, feedback>(job, row, static_cast<int>(blockIdx.y), room[warp]);
  }
}

// The place of a (row, query head) among the halves, in rows of head_dim.
__device__ inline int64_t half_row(const HeadRows& job, int64_t row, int head) {
  const RowPlace place = job.places[row];
  const int64_t of_head = static_cast<int64_t>(place.before) * job.kv_heads +
                          static_cast<int64_t>(head / job.heads_per_kv) * place.tokens + place.token;
  return of_head * job.heads_per_kv + head % job.heads_per_kv;
}

template <int dim, bool queries>
__global__ void __launch_bounds__(kRowThreads) head_kernel(const __grid_constant__ HeadRows job) {
  __shared__ float room[kRowWarps][dim];
  const int heads = job.kv_heads * job.heads_per_kv;
  const int64_t task = row_of();
  if (task >= static_cast<int64_t>(job.rows) * heads) return;
  const int lane = lane_of(), head = static_cast<int>(task % heads);
  const int64_t row = task / heads;
  __half* const half = static_cast<__half*>(job.halves) + half_row(job, row, head) * dim;
  float x[dim / 32];
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    x[i] = queries ? job.q[row * job.stride + head * dim + 32 * i + lane] : __half2float(half[32 * i + lane]);
  }
  apply<dim>(job.ops, head / job.heads_per_kv, x, room[threadIdx.x / 32]);
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    if constexpr (queries) {
      // What fp16 does not hold is as large as it can be; NaN stays.
      const float limited = fabsf(x[i]) > 65504.0f ? copysignf(65504.0f, x[i]) : x[i];
      half[32 * i + lane] = __float2half_rn(limited);
    } else {
      job.out[row * job.stride + head * dim + 32 * i + lane] = x[i];
    }
  }
}

// The number of an element of a record's side, as Codec::decode gives it.
__device__ inline float number_of(const SideShape& side, bool key, const uint8_t* part, int token, int channel) {
  const CodeCell cell = code_cell(key, token, channel);
  const auto* const halves = reinterpret_cast<const uint16_t*>(part);
  const auto bit_half = [&](const CodePlace& place) {
    return halves[(cell.block * block_bytes(side.bits) + word_offset(side.bits, cell.at.lane, place.word)) / 2 + cell.at.half];
  };
  const auto float_of = [](uint16_t h) { return __half2float(__ushort_as_half(h)); };
  if (side.bits == 16) return float_of(bit_half(code_bit_place(16, cell.at.reg, cell.field, 0)));
  int code = 0;
  for (int b = 0; b < side.bits; ++b) {
    const CodePlace place = code_bit_place(side.bits, cell.at.reg, cell.field, b);
    code |= (bit_half(place) >> place.bit & 1) << b;
  }
  const auto* const scales = reinterpret_cast<const uint16_t*>(part + side.meta()) + side.scale_at(token, channel);
  const float centre = static_cast<float>((1 << side.bits) - 1) * 0.5f;
  return float_of(scales[kMidStep]) + float_of(scales[0]) * (static_cast<float>(code) - centre);
}

// Rows that a warp feeds errors back in at once.
__host__ __device__ constexpr int rows_together(int head_dim) { return head_dim <= 128 ? 4 : 2; }

// A warp takes some tokens of a side.
template <int dim>
__global__ void __launch_bounds__(kRowThreads)
    open_kernel(const uint8_t* record, RecordShape shape, uint8_t* page, RecordShape open, const float* columns) {
  constexpr int kRows = rows_together(dim);
  const int task = static_cast<int>(row_of()), token = task / 2 * kRows, lane = lane_of();
  const auto bring = [&](auto key) {
    const SideShape side = key ? shape.key() : shape.value();
    const uint8_t* const part = record + (key ? kHeaderBytes : shape.key_bytes());
    float x[kRows][dim / 32];
    OpenSlot to[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < dim / 32; ++i) x[r][i] = number_of(side, key, part, token + r, 32 * i + lane);
      to[r] = {page, token + r, kPageTokens, !open.has_codes()};
    }
    store_rows<dim, kRows, key, true>(x, open, columns, to);
  };
  if (task % 2 == 0) {
    bring(std::true_type{});
  } else {
    bring(std::false_type{});
  }
}

constexpr unsigned kPatchThreads = 128;
__global__ void patch_kernel(int32_t* ids, const TablePatch* patches, size_t count) {
  const size_t at = size_t{blockIdx.x} * kPatchThreads + threadIdx.x;
  if (at < count) ids[patches[at].at] = patches[at].id;
}

unsigned blocks_of(int64_t warps) { return static_cast<unsigned>((warps + kRowWarps - 1) / kRowWarps); }

template <class Body>
void with_head_dim(int head_dim, const char* what, const Body& body) {
  if (HeadDims::visit(head_dim, body)) return check_cuda(cudaGetLastError(), what);
  throw Error(Status::kUnsupported, std::string(what) + ": head_dim " + std::to_string(head_dim) + " has no kernel");
}

}  // namespace

void patch_table(int32_t* ids, const TablePatch* patches, size_t count, cudaStream_t stream) {
  if (count == 0) return;
  patch_kernel<<<static_cast<unsigned>((count + kPatchThreads - 1) / kPatchThreads), kPatchThreads, 0, stream>>>(ids, patches,
                                                                                                                 count);
  check_cuda(cudaGetLastError(), "page tables: launch");
}

void append_rows(const AppendRows& job, cudaStream_t stream) {
  const auto grid = [&](int rows_of_warp) {
    const int of_block = kRowWarps * rows_of_warp;
    return dim3(static_cast<unsigned>((job.rows + of_block - 1) / of_block), static_cast<unsigned>(job.kv_heads), 2);
  };
  constexpr int64_t kManyRows = 2048;  // with fewer a warp each is faster
  const bool many = static_cast<int64_t>(job.rows) * job.kv_heads >= kManyRows;
  with_head_dim(job.head_dim, "append rows: launch", [&](auto dim) {
    constexpr int kTogether = rows_together(dim.value);
    if (job.key_columns == nullptr) {
      append_kernel<dim.value, 1, false><<<grid(1), kRowThreads, 0, stream>>>(job);
    } else if (many) {
      append_kernel<dim.value, kTogether, true><<<grid(kTogether), kRowThreads, 0, stream>>>(job);
    } else {
      append_kernel<dim.value, 1, true><<<grid(1), kRowThreads, 0, stream>>>(job);
    }
  });
}

void map_queries(const HeadRows& job, cudaStream_t stream) {
  const unsigned blocks = blocks_of(static_cast<int64_t>(job.rows) * job.kv_heads * job.heads_per_kv);
  with_head_dim(job.head_dim, "map queries: launch",
                [&](auto dim) { head_kernel<dim.value, true><<<blocks, kRowThreads, 0, stream>>>(job); });
}

void map_outputs(const HeadRows& job, cudaStream_t stream) {
  const unsigned blocks = blocks_of(static_cast<int64_t>(job.rows) * job.kv_heads * job.heads_per_kv);
  with_head_dim(job.head_dim, "map outputs: launch",
                [&](auto dim) { head_kernel<dim.value, false><<<blocks, kRowThreads, 0, stream>>>(job); });
}

void open_record(const uint8_t* record, const RecordShape& shape, uint8_t* page, const RecordShape& open, const float* columns,
                 cudaStream_t stream) {
  with_head_dim(shape.head_dim, "open a sealed page: launch", [&](auto dim) {
    open_kernel<dim.value>
        <<<blocks_of(2 * kPageTokens / rows_together(dim.value)), kRowThreads, 0, stream>>>(record, shape, page, open, columns);
  });
}

}  // namespace kvmix::cuda
