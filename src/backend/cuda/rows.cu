// A warp takes a row of one head: lane l holds channels l, l + 32, ... Compiled without fused multiply-adds.
#include <cuda_fp16.h>

#include <string>
#include <type_traits>

#include "backend/cuda/layer_format.h"
#include "backend/cuda/row_store.cuh"
#include "backend/cuda/rows.h"
#include "base/cuda/launch.h"
#include "base/cuda/overlap.cuh"
#include "codec/cuda/format.h"
#include "codec/cuda/hadamard.cuh"

namespace kvmix::cuda {
namespace {

constexpr int kRowWarps = 8, kRowThreads = 32 * kRowWarps;
constexpr int64_t kUnitBytes = static_cast<int64_t>(kPageUnit);

__device__ inline int64_t row_of() { return static_cast<int64_t>(blockIdx.x) * kRowWarps + static_cast<int>(threadIdx.x) / 32; }

// A lane's numbers of the row maps, all asked for at once: they come from memory, which takes longer than what is done with
// them.
template <int dim>
struct RowNumbers {
  float subtract[dim / 32], multiply[dim / 32], divide[dim / 32], divide_after[dim / 32];

  __device__ RowNumbers(const RowOps& ops, int head) {
    const int first = head * dim + lane_of();
    const auto load = [&](float(&to)[dim / 32], const float* numbers) {
      if (numbers == nullptr) return;
#pragma unroll
      for (int i = 0; i < dim / 32; ++i) to[i] = __ldg(numbers + first + 32 * i);
    };
    load(subtract, ops.subtract), load(multiply, ops.multiply), load(divide, ops.divide), load(divide_after, ops.divide_after);
  }
};

// `room`: dim floats of shared memory of this warp.
template <int dim>
__device__ inline void apply(const RowOps& ops, const RowNumbers<dim>& numbers, int head, float (&x)[dim / 32], float* room) {
  const int lane = lane_of();
  const auto each = [&](bool given, const float(&by)[dim / 32], auto op) {
    if (!given) return;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) x[i] = op(x[i], by[i]);
  };
  each(ops.subtract != nullptr, numbers.subtract, [](float a, float b) { return a - b; });
  each(ops.multiply != nullptr, numbers.multiply, [](float a, float b) { return a * b; });
  each(ops.divide != nullptr, numbers.divide, [](float a, float b) { return a / b; });
  if (ops.hadamard) hadamard<dim>(x);
  each(ops.divide_after != nullptr, numbers.divide_after, [](float a, float b) { return a / b; });
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

// The rows of a warp, `rows` of a head, mapped, and where they go.
template <int dim, int rows, bool key>
__device__ inline void take_rows(const AppendRows& job, int row0, int head, float* room, float (&x)[rows][dim / 32],
                                 OpenSlot (&to)[rows]) {
  const int lane = lane_of();
  const RowOps& ops = key ? job.key : job.value;
  const RowNumbers<dim> numbers(ops, head);
  wait_for_launch_before();
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int64_t row = row0 + r;
    if (row >= job.rows) break;
    const RowPlace place = job.places[row];
    const float* const from = (key ? job.k + row * job.k_stride : job.v + row * job.v_stride) + head * dim;
#pragma unroll
    for (int i = 0; i < dim / 32; ++i) x[r][i] = from[32 * i + lane];
    apply<dim>(ops, numbers, head, x[r], room);
    const PageTable& table = job.table;
    const int64_t list = static_cast<int64_t>(place.entry) * job.kv_heads + head;
    const int at = place.position - (job.dropped == nullptr ? 0 : job.dropped[list]);
    const bool sink = at < table.sinks;
    const int behind = at - table.sinks;
    const int page = sink ? 0 : behind / kPageTokens + (table.sinks > 0 ? 1 : 0);
    const int32_t id = table.ids[list * table.stride + page];
    to[r] = {table.pages + static_cast<int64_t>(~id) * kUnitBytes, sink ? at : behind % kPageTokens,
             sink ? table.sinks : kPageTokens, sink || !job.open.has_codes()};
  }
}

template <int dim>
__global__ void __launch_bounds__(kRowThreads, 4) append_kernel(const __grid_constant__ AppendRows job) {
  __shared__ float room[kRowWarps][dim];
  let_next_launch_begin();
  const int warp = static_cast<int>(threadIdx.x) / 32, row = static_cast<int>(blockIdx.x) * kRowWarps + warp;
  if (row >= job.rows) return;
  const auto append = [&](auto key) {
    float x[1][dim / 32] = {};
    OpenSlot to[1];
    take_rows<dim, 1, key.value>(job, row, static_cast<int>(blockIdx.y), room[warp], x, to);
    store_rows<dim, 1, key.value>(x, job.open, to, {});
  };
  if (blockIdx.z == 0) {
    append(std::true_type{});
  } else {
    append(std::false_type{});
  }
}

// Blocks of one head and side, whose key rows share its panels. A warp takes `rows` rows next to each other.
template <int dim, int rows>
__global__ void __launch_bounds__(kFeedbackThreads, dim <= 128 ? 3 : 1)
    append_feedback_kernel(const __grid_constant__ AppendRows job) {
  extern __shared__ __align__(16) uint8_t shared[];
  let_next_launch_begin();
  const int warp = static_cast<int>(threadIdx.x) / 32, head = static_cast<int>(blockIdx.y);
  const int row = (static_cast<int>(blockIdx.x) * kFeedbackWarps + warp) * rows;
  float x[rows][dim / 32] = {};
  OpenSlot to[rows];
  if (blockIdx.z == 0) {
    const auto feedback = bring_panels<dim, rows>(shared, job.key_panels + head * feedback_panel(dim, dim));
    take_rows<dim, rows, true>(job, row, head, feedback.room->exact[0], x, to);
    wait_panels();
    store_rows<dim, rows, true>(x, job.open, to, feedback);
  } else {
    take_rows<dim, rows, false>(job, row, head, reinterpret_cast<float*>(shared) + warp * dim, x, to);
    store_rows<dim, rows, false>(x, job.open, to, {});
  }
}

template <int dim, bool queries>
__global__ void __launch_bounds__(kRowThreads) head_kernel(const __grid_constant__ HeadRows job) {
  __shared__ float room[kRowWarps][dim];
  const int heads = job.kv_heads * job.heads_per_kv, lane = lane_of();
  const int64_t task = row_of(), tasks = static_cast<int64_t>(job.rows) * heads, row = min(task, tasks - 1) / heads;
  const int head = static_cast<int>(min(task, tasks - 1) - row * heads);
  // What is older than the launch before: the row's place and the numbers of its maps.
  const RowPlace place = job.places[row];
  __half* const half = static_cast<__half*>(job.halves) +
                       half_row(place.before, place.tokens, place.token, head, job.kv_heads, job.heads_per_kv) * dim;
  const RowNumbers<dim> numbers(job.ops, head / job.heads_per_kv);
  // What reads outputs waits for this launch; until then it may ask for its weights, where attention leaves multiprocessors
  // idle.
  if (!queries) let_next_launch_begin();
  wait_for_launch_before();
  if (queries) let_next_launch_begin();
  if (task >= tasks) return;
  float x[dim / 32];
#pragma unroll
  for (int i = 0; i < dim / 32; ++i) {
    x[i] = queries ? job.q[row * job.stride + head * dim + 32 * i + lane] : __half2float(half[32 * i + lane]);
  }
  apply<dim>(job.ops, numbers, head / job.heads_per_kv, x, room[threadIdx.x / 32]);
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

// Rows that a warp feeds errors back in at once.
__host__ __device__ constexpr int rows_together(int head_dim) { return head_dim <= 128 ? 4 : 2; }

// A warp takes some tokens of a side; `panels` is null where keys have no feedback.
template <int dim, bool feedback>
__global__ void __launch_bounds__(kFeedbackThreads)
    open_kernel(const uint8_t* record, RecordShape shape, uint8_t* page, RecordShape open, const float* panels) {
  extern __shared__ __align__(16) uint8_t shared[];
  constexpr int kRows = rows_together(dim);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_of();
  const int token = (static_cast<int>(blockIdx.x) * kFeedbackWarps + warp) * kRows;
  const auto bring = [&](auto key, const Feedback<dim, kRows>& with) {
    const SideShape side = key ? shape.key() : shape.value();
    const uint8_t* const part = record + (key ? kHeaderBytes : shape.key_bytes());
    float x[kRows][dim / 32];
    OpenSlot to[kRows];
    with_numbers(side, key, part, [&](const auto& number) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < dim / 32; ++i) x[r][i] = number(token + r, 32 * i + lane);
        to[r] = {page, token + r, kPageTokens, !open.has_codes()};
      }
    });
    store_rows<dim, kRows, key>(x, open, to, with);
  };
  if (blockIdx.y == 1) {
    bring(std::false_type{}, {});
  } else if constexpr (feedback) {
    const auto with = bring_panels<dim, kRows>(shared, panels);
    wait_panels();
    bring(std::true_type{}, with);
  } else {
    bring(std::true_type{}, {});
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

void append_rows(const AppendRows& job, bool overlapped, cudaStream_t stream) {
  constexpr auto kWhat = "append rows: launch";
  const auto grid = [&](int rows_of_block) {
    return dim3(static_cast<unsigned>((job.rows + rows_of_block - 1) / rows_of_block), static_cast<unsigned>(job.kv_heads), 2);
  };
  constexpr int64_t kManyRows = 1024;  // with fewer a warp each is faster
  const bool many = static_cast<int64_t>(job.rows) * job.kv_heads >= kManyRows;
  with_head_dim(job.head_dim, kWhat, [&](auto dim) {
    const auto feed_back = [&](auto rows) {
      auto* const kernel = append_feedback_kernel<dim.value, rows.value>;
      constexpr int kShared = FeedbackSpace<dim.value, rows.value>::bytes;
      allow_shared(kernel, kShared, "append rows: shared memory");
      launch_overlapped(overlapped, kernel, grid(kFeedbackWarps * rows.value), kFeedbackThreads, kShared, stream, job, kWhat);
    };
    if (job.key_panels == nullptr) {
      launch_overlapped(overlapped, append_kernel<dim.value>, grid(kRowWarps), kRowThreads, 0, stream, job, kWhat);
    } else if (many) {
      feed_back(std::integral_constant<int, rows_together(dim.value)>{});
    } else {
      feed_back(std::integral_constant<int, 1>{});
    }
  });
}

void map_queries(const HeadRows& job, cudaStream_t stream) {
  const dim3 blocks(blocks_of(static_cast<int64_t>(job.rows) * job.kv_heads * job.heads_per_kv));
  with_head_dim(job.head_dim, "map queries: launch", [&](auto dim) {
    launch_overlapped(true, head_kernel<dim.value, true>, blocks, kRowThreads, 0, stream, job, "map queries: launch");
  });
}

void map_outputs(const HeadRows& job, cudaStream_t stream) {
  const dim3 blocks(blocks_of(static_cast<int64_t>(job.rows) * job.kv_heads * job.heads_per_kv));
  with_head_dim(job.head_dim, "map outputs: launch", [&](auto dim) {
    launch_overlapped(true, head_kernel<dim.value, false>, blocks, kRowThreads, 0, stream, job, "map outputs: launch");
  });
}

void open_record(const uint8_t* record, const RecordShape& shape, uint8_t* page, const RecordShape& open, const float* panels,
                 cudaStream_t stream) {
  with_head_dim(shape.head_dim, "open a sealed page: launch", [&](auto dim) {
    constexpr int kRows = rows_together(dim.value), kShared = FeedbackSpace<dim.value, kRows>::bytes;
    const dim3 grid(kPageTokens / (kFeedbackWarps * kRows), 2);
    if (panels == nullptr) {
      open_kernel<dim.value, false><<<grid, kFeedbackThreads, 0, stream>>>(record, shape, page, open, nullptr);
    } else {
      auto* const kernel = open_kernel<dim.value, true>;
      allow_shared(kernel, kShared, "open a sealed page: shared memory");
      kernel<<<grid, kFeedbackThreads, kShared, stream>>>(record, shape, page, open, panels);
    }
  });
}

}  // namespace kvmix::cuda
