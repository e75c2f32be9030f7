#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "base/cuda/bulk_copy.cuh"
#include "base/cuda/launch.h"
#include "base/cuda/overlap.cuh"
#include "engine/cuda/row_products.h"

namespace kvmix::cuda {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * 32;  // and a warp that asks for rows
constexpr int kColumns = kThreads * 8;              // of one vector a thread
constexpr int kFlush = kThreads / kWarps;           // rows whose sums are put together at once
constexpr int kMostStages = 16;
// Of rows on their way. Two blocks do not fit a multiprocessor, so that each has one and the next launch's begins, and asks for
// its rows, where one has ended; rows that are stored meanwhile (rows.cu) do fit beside it.
constexpr int kRingBytes = 160 << 10;
static_assert(kRowProductColumns == 4 * kColumns);

__host__ __device__ constexpr int rows_of_stage(int vectors) { return vectors == 1 ? 4 : 1; }

struct Job {
  RowProduct product;
  int units;   // rows, or pairs of them: what blocks share
  int stages;  // of the ring
};

__host__ __device__ inline bool in_pairs(const RowProduct& p) { return p.gate != Gate::kNone || p.half > 0; }

// Rows in the order in which blocks take them: of gated matrices one of each in turn, else one matrix after the other, and of
// heads that are turned the rows of a pair together.
struct Place {
  int matrix, row;
};
__device__ inline Place place_of(const RowProduct& p, int at) {
  if (p.gate != Gate::kNone) return {at & 1, at >> 1};
  const int matrix = at < p.matrices[0].rows ? 0 : 1;
  if (matrix == 1) at -= p.matrices[0].rows;
  if (p.matrices[matrix].turns == nullptr || !p.far) return {matrix, at};
  const int pair = at >> 1, head = pair / p.half;
  return {matrix, head * 2 * p.half + pair % p.half + (at & 1) * p.half};
}

__device__ inline float2 numbers(uint32_t pair, __half) { return __half22float2(reinterpret_cast<const __half2&>(pair)); }
__device__ inline float2 numbers(uint32_t pair, __nv_bfloat16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ inline float gated(Gate gate, float x) {
  if (gate == Gate::kSilu) return x / (1.0f + __expf(-x));
  return 0.5f * x * (1.0f + tanhf(0.79788456080286535588f * x * (1.0f + 0.044715f * x * x)));
}

__device__ inline void load8(float (&to)[8], const float* from) {
  const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// The thread's share of a row's products: eight columns of every kThreads * 8.
template <class Number, int inputs, int vectors>
__device__ inline void share(float (&s)[inputs], const uint8_t* row, const float (&x)[inputs][vectors][8], int count) {
  float even[inputs] = {}, odd[inputs] = {};
#pragma unroll
  for (int j = 0; j < vectors; ++j) {
    const int v = static_cast<int>(threadIdx.x) + kThreads * j;
    if (v >= count) continue;
    const uint4 w = reinterpret_cast<const uint4*>(row)[v];
    const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = numbers(pairs[i], Number{});
#pragma unroll
      for (int n = 0; n < inputs; ++n) even[n] += f.x * x[n][j][2 * i], odd[n] += f.y * x[n][j][2 * i + 1];
    }
  }
#pragma unroll
  for (int n = 0; n < inputs; ++n) s[n] = even[n] + odd[n];
}

// A block has a run of rows. One warp asks for them, a stage of `step` rows after the other around a ring in shared memory; the
// others have x in registers, `vectors` times eight columns a thread, and share every row.
template <class Number, int inputs, int vectors>
__global__ __launch_bounds__(kThreads + 32, 1) void row_product_kernel(const __grid_constant__ Job job) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int step = rows_of_stage(vectors);
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t there[kMostStages], used[kMostStages];
  __shared__ float partial[2][inputs][kFlush][kWarps + 1], squares[inputs][kWarps];
  const RowProduct& p = job.product;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int rows = in_pairs(p) ? 2 : 1, bytes = p.columns * 2;
  const auto first_of = [&](unsigned block) {
    return static_cast<int>(static_cast<int64_t>(job.units) * block / gridDim.x) * rows;
  };
  const int begin = first_of(blockIdx.x), end = first_of(blockIdx.x + 1);
  if (thread == 0) {
    for (int i = 0; i < job.stages; ++i)
      init_barrier(shared_address(&there[i]), 1), init_barrier(shared_address(&used[i]), kWarps);
    publish_barriers();
  }
  __syncthreads();
  if (warp == kWarps) {
    if (lane != 0) return;
    const uint64_t policy = copy_policy(true);
    for (int at = begin, slot = 0, turn = 1; at < end; at += step) {
      wait(shared_address(&used[slot]), turn);
      const int count = min(step, end - at);
      const uint32_t barrier = shared_address(&there[slot]);
      expect_bytes(barrier, count * bytes);
      for (int i = 0; i < count; ++i) {
        const Place row = place_of(p, at + i);
        copy_bulk(shared_address(ring + static_cast<size_t>(slot * step + i) * bytes),
                  static_cast<const uint8_t*>(p.matrices[row.matrix].weights) + static_cast<size_t>(row.row) * bytes, bytes,
                  barrier, policy);
      }
      if (++slot == job.stages) slot = 0, turn ^= 1;
    }
    return;
  }
  wait_for_launch_before();
  let_next_launch_begin();

  float x[inputs][vectors][8] = {}, energy[inputs] = {};
  const int count = p.columns / 8;
#pragma unroll
  for (int j = 0; j < vectors; ++j) {
    const int v = thread + kThreads * j;
    if (v >= count) continue;
    float weights[8];
    if (p.norm != nullptr) load8(weights, p.norm + 8 * v);
#pragma unroll
    for (int n = 0; n < inputs; ++n) {
      load8(x[n][j], p.in + static_cast<size_t>(n) * p.columns + 8 * v);
      if (p.norm == nullptr) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) energy[n] += x[n][j][i] * x[n][j][i], x[n][j][i] *= weights[i];
    }
  }
  const auto sum = [](float s, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
    return s;
  };
#pragma unroll
  for (int n = 0; n < inputs; ++n) {
    energy[n] = sum(energy[n], 32);
    if (lane == 0) squares[n][warp] = energy[n];
  }

  int slot = 0, turn = 0, half = 0;
  for (int from = begin; from < end; from += kFlush, half ^= 1) {
    const int to = min(from + kFlush, end);
    for (int at = from; at < to; at += step) {
      wait(shared_address(&there[slot]), turn);
      float s[step][inputs];
#pragma unroll
      for (int i = 0; i < step; ++i) share<Number>(s[i], ring + static_cast<size_t>(slot * step + i) * bytes, x, count);
      __syncwarp();
      if (lane == 0) arrive(shared_address(&used[slot]));
      if (++slot == job.stages) slot = 0, turn ^= 1;
#pragma unroll
      for (int i = 0; i < step; ++i) {
#pragma unroll
        for (int n = 0; n < inputs; ++n) {
          s[i][n] = sum(s[i][n], 32);
          if (lane == 0 && at + i < to) partial[half][n][at + i - from][warp] = s[i][n];
        }
      }
    }
    // The other half is read until the next time.
    asm volatile("bar.sync 1, %0;\n" ::"n"(kThreads) : "memory");
    const int row = thread / kWarps, part = thread % kWarps, at = from + row;
    const Place place = place_of(p, min(at, to - 1));
    const RowMatrix& matrix = p.matrices[place.matrix];
#pragma unroll
    for (int n = 0; n < inputs; ++n) {
      float y = sum(at < to ? partial[half][n][row][part] : 0.0f, kWarps);
      if (p.norm != nullptr) y *= rsqrtf(sum(squares[n][part], kWarps) / static_cast<float>(p.columns) + p.epsilon);
      const size_t there = static_cast<size_t>(n) * matrix.rows + place.row;
      if (matrix.added != nullptr) y += matrix.added[matrix.one_added ? place.row : there];
      const float other = __shfl_xor_sync(0xffffffffu, y, kWarps);  // the next row's, or the one's before
      if (part != 0 || at >= to) continue;
      if (p.gate != Gate::kNone) {
        if (place.matrix == 0) matrix.out[there] = gated(p.gate, y) * other;
      } else if (matrix.turns != nullptr) {
        const int in_head = place.row % (2 * p.half);
        const float2 turn = matrix.turns[n * p.half + (p.far ? in_head % p.half : in_head / 2)];
        matrix.out[there] = y * turn.x + ((at & 1) == 0 ? -other : other) * turn.y;
      } else {
        matrix.out[there] = y;
      }
    }
  }
#endif
}

template <class Number, int inputs, int vectors>
void launch(Job job, cudaStream_t stream) {
  const int stage = rows_of_stage(vectors) * job.product.columns * 2;
  job.stages = std::clamp(kRingBytes / stage, 1, kMostStages);
  const int shared = job.stages * stage;
  const auto kernel = row_product_kernel<Number, inputs, vectors>;
  constexpr auto kWhat = "products of rows";
  allow_shared(kernel, shared, kWhat);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
             kWhat);
  const int blocks = std::min(device_attribute(cudaDevAttrMultiProcessorCount), job.units);
  launch_overlapped(true, kernel, dim3(static_cast<unsigned>(blocks)), kThreads + 32, static_cast<size_t>(shared), stream, job,
                    kWhat);
}

template <class Number, int inputs>
void launch_inputs(const Job& job, cudaStream_t stream) {
  switch ((job.product.columns + kColumns - 1) / kColumns) {
    case 1:
      return launch<Number, inputs, 1>(job, stream);
    case 2:
      return launch<Number, inputs, 2>(job, stream);
    case 3:
      return launch<Number, inputs, 3>(job, stream);
    default:
      return launch<Number, inputs, 4>(job, stream);
  }
}

template <class Number>
void launch_type(const Job& job, cudaStream_t stream) {
  if (job.product.inputs == 1) {
    launch_inputs<Number, 1>(job, stream);
  } else {
    launch_inputs<Number, 2>(job, stream);
  }
}

__global__ void turn_kernel(Turns turns) {
  const int pair = static_cast<int>(threadIdx.x), input = static_cast<int>(blockIdx.x);
  float whole = static_cast<float>(turns.positions[input]) * powf(turns.base, -static_cast<float>(pair) / turns.half);
  if (turns.factors != nullptr) whole /= turns.factors[pair];
  float angle = turns.scale * whole, size = turns.size;
  if (turns.extrapolated != 0) {
    const float along = (static_cast<float>(pair) - turns.low) / fmaxf(0.001f, turns.high - turns.low);
    angle += (whole - angle) * (1 - fminf(1, fmaxf(0, along))) * turns.extrapolated;
    size *= 1 + 0.1f * logf(1 / turns.scale);
  }
  turns.table[input * turns.half + pair] = {cosf(angle) * size, sinf(angle) * size};
}

}  // namespace

bool has_row_products() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

void queue_turns(const Turns& turns, cudaStream_t stream) {
  turn_kernel<<<static_cast<unsigned>(turns.inputs), static_cast<unsigned>(turns.half), 0, stream>>>(turns);
  check_cuda(cudaGetLastError(), "rotations of a step");
}

void queue_row_product(const RowProduct& product, cudaStream_t stream) {
  Job job{product, 0, 0};
  for (int i = 0; i < (product.gate == Gate::kNone ? product.count : 1); ++i) job.units += product.matrices[i].rows;
  if (product.half > 0) job.units /= 2;
  if (product.bf16) {
    launch_type<__nv_bfloat16>(job, stream);
  } else {
    launch_type<__half>(job, stream);
  }
}

}  // namespace kvmix::cuda
