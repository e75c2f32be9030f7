// Dots of a page's keys and all queries of a KV head by a thread block, which decodes the page once; then each query's softmax;
// then its weights are added up in the queries' order, so that sums do not depend on how a prompt was cut into chunks.
#include <cmath>
#include <string>

#include "backend/cuda/layer_format.h"
#include "backend/cuda/row_store.cuh"
#include "backend/cuda/window.h"
#include "base/cuda/launch.h"
#include "codec/cuda/format.h"

namespace kvmix::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = 16, kRowsOfThread = kRowsAtOnce * kPageTokens / kThreads;

__global__ void keep_kernel(const __grid_constant__ KeepQueries job) {
  const int64_t position = job.begin + blockIdx.x;
  const int q_heads = job.kv_heads * job.heads_per_kv, octets = job.head_dim / 8;
  const int64_t at = position % job.window * q_heads * octets;
  for (int i = static_cast<int>(threadIdx.x); i < q_heads * octets; i += kThreads) {
    const int head = i / octets, octet = i % octets;
    const uint4* from = reinterpret_cast<const uint4*>(job.kept) + at + i;
    if (position >= job.start) {
      const int64_t row = half_row(job.before, job.tokens, position - job.start, head, job.kv_heads, job.heads_per_kv);
      from = reinterpret_cast<const uint4*>(job.halves) + row * octets + octet;
    }
    reinterpret_cast<uint4*>(job.to)[at + i] = *from;
  }
}

// Scores of the heads from `first_head` on: [heads][heads_per_kv][rows][most_tokens], and behind them each row's largest score
// and one by its sum.
struct Scores {
  int first_head, heads;
};
__device__ inline float* scores_of(const ScoreWindow& job, int head, int row) {
  return job.room + (static_cast<int64_t>(head) * job.heads_per_kv * job.rows + row) * job.most_tokens;
}
__device__ inline float2* softmax_of(const ScoreWindow& job, const Scores& scores, int head, int row) {
  const int rows = job.heads_per_kv * job.rows;
  float* const behind = job.room + static_cast<int64_t>(scores.heads) * rows * job.most_tokens;
  return reinterpret_cast<float2*>(behind + (static_cast<int64_t>(scores.heads) * rows * job.most_tokens & 1)) +
         static_cast<int64_t>(head) * rows + row;
}

template <int dim>
struct DotSpace {
  static constexpr int row = dim + 4;  // floats, so that four lanes' quarters lie in different banks
  static constexpr int bytes = (kPageTokens * row + kRowsAtOnce * dim) * 4;
};

template <int dim>
__global__ void __launch_bounds__(kThreads) dots_kernel(const __grid_constant__ ScoreWindow job, Scores scores) {
  extern __shared__ __align__(16) float space[];
  float* const keys = space;
  float* const queries = space + kPageTokens * DotSpace<dim>::row;
  const int thread = static_cast<int>(threadIdx.x), page = static_cast<int>(blockIdx.x);
  const int head = scores.first_head + static_cast<int>(blockIdx.y), sinks = job.table.sinks;
  const bool sink = sinks > 0 && page == 0;
  const int64_t first = sinks == 0 ? static_cast<int64_t>(page) * kPageTokens
                        : sink     ? 0
                                   : sinks + static_cast<int64_t>(page - 1) * kPageTokens;
  const int64_t left = job.heads[head].tokens - first;
  if (left <= 0) return;
  const int slots = sink ? sinks : kPageTokens, count = static_cast<int>(min(left, static_cast<int64_t>(slots)));
  const int32_t id = job.table.ids[head * job.table.stride + page];
  const uint8_t* const at = job.table.pages + static_cast<int64_t>(id < 0 ? ~id : id) * static_cast<int64_t>(kPageUnit);
  const bool rows = sink || (id < 0 && !job.open.has_codes());
  const SideShape side = id < 0 ? job.open.key() : job.sealed.key();
  // Channels that were not chosen add nothing.
  const int width = id < 0 || sink ? 0 : reinterpret_cast<const RecordHeader*>(at)->key_width;
  if (width > 0) {
    const uint8_t* const chosen = job.channels + head * width;
    for (int i = thread; i < count * dim; i += kThreads) keys[i / dim * DotSpace<dim>::row + i % dim] = 0.0f;
    __syncthreads();
    for (int i = thread; i < count * width; i += kThreads) {
      const int token = i / width, column = i % width;
      keys[token * DotSpace<dim>::row + chosen[column]] = even_number(job.thin.key(), true, at + kHeaderBytes, token, column);
    }
  }
  with_numbers(side, true, at + kHeaderBytes, [&](const auto& number) {
    for (int i = thread; width == 0 && i < count * dim; i += kThreads) {
      const int token = i / dim, channel = i % dim;
      keys[token * DotSpace<dim>::row + channel] =
          rows ? __half2float(reinterpret_cast<const __half*>(at)[i]) : number(token, channel);
    }
  });
  const int token = thread % kPageTokens, mine = thread / kPageTokens * kRowsOfThread;
  const int all = job.heads_per_kv * job.rows, q_heads = job.kv_heads * job.heads_per_kv;
  for (int row = 0; row < all; row += kRowsAtOnce) {
    __syncthreads();
    for (int i = thread; i < kRowsAtOnce * dim; i += kThreads) {
      const int r = min(row + i / dim, all - 1), q_head = head * job.heads_per_kv + r / job.rows;
      const int64_t place = (job.begin + r % job.rows) % job.window * q_heads + q_head;
      queries[i] = __half2float(job.queries[place * dim + i % dim]);
    }
    __syncthreads();
    if (token >= count) continue;
    float sums[kRowsOfThread] = {};
    const float* const key = keys + token * DotSpace<dim>::row;
    for (int c = 0; c < dim; c += 4) {
      const float4 k = *reinterpret_cast<const float4*>(key + c);
#pragma unroll
      for (int r = 0; r < kRowsOfThread; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(queries + (mine + r) * dim + c);
        sums[r] += q.x * k.x, sums[r] += q.y * k.y, sums[r] += q.z * k.z, sums[r] += q.w * k.w;
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (row + mine + r < all) scores_of(job, static_cast<int>(blockIdx.y), row + mine + r)[first + token] = sums[r];
    }
  }
}

// What a query sees: not what came after it.
__device__ inline int64_t seen_by(const ScoreWindow& job, int head, int row) {
  return job.heads[head].tokens - (job.rows - 1 - row % job.rows);
}

template <bool largest>
__device__ inline float of_block(float x, float* room) {
  const auto join = [](float a, float b) { return largest ? fmaxf(a, b) : a + b; };
  for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(~0u, x, step));
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = room[0];
  for (int warp = 1; warp < kThreads / 32; ++warp) x = join(x, room[warp]);
  return x;
}

__global__ void __launch_bounds__(kThreads) softmax_kernel(const __grid_constant__ ScoreWindow job, Scores scores) {
  __shared__ float room[kThreads / 32];
  const int row = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  float* const x = scores_of(job, head, row);
  const int64_t seen = seen_by(job, scores.first_head + head, row);
  float most = -INFINITY;
  for (int64_t i = threadIdx.x; i < seen; i += kThreads) {
    float v = x[i] * job.scale;
    if (job.softcap > 0.0f) v = job.softcap * tanhf(v / job.softcap);
    x[i] = v;
    most = fmaxf(most, v);
  }
  most = of_block<true>(most, room);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < seen; i += kThreads) sum += expf(x[i] - most);
  sum = of_block<false>(sum, room);
  if (threadIdx.x == 0) *softmax_of(job, scores, head, row) = {most, 1.0f / sum};
}

__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ ScoreWindow job, Scores scores) {
  const int head = static_cast<int>(blockIdx.y), q_head = static_cast<int>(blockIdx.z);
  const WindowHead of_head = job.heads[scores.first_head + head];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= of_head.tokens) return;
  float sum = 0.0f;
  for (int r = 0; r < job.rows; ++r) {
    const int row = q_head * job.rows + r;
    if (token >= seen_by(job, scores.first_head + head, row)) continue;
    const float2 softmax = *softmax_of(job, scores, head, row);
    sum += expf(scores_of(job, head, row)[token] - softmax.x) * softmax.y;
  }
  job.sums[of_head.first_sum + q_head * of_head.tokens + token] = sum;
}

}  // namespace

void keep_queries(const KeepQueries& job, cudaStream_t stream) {
  if (job.end <= job.begin) return;
  keep_kernel<<<static_cast<unsigned>(job.end - job.begin), kThreads, 0, stream>>>(job);
  check_cuda(cudaGetLastError(), "keep a prompt's queries: launch");
}

size_t window_room(int heads_per_kv, int rows, int64_t most_tokens) {
  const size_t all = static_cast<size_t>(heads_per_kv) * static_cast<size_t>(rows);
  return all * (static_cast<size_t>(most_tokens) + 2) + 1;
}

void score_window(const ScoreWindow& job, cudaStream_t stream) {
  const auto pages = static_cast<unsigned>((job.most_tokens + kPageTokens - 1) / kPageTokens + (job.table.sinks > 0 ? 1 : 0));
  const auto together = static_cast<int>(job.room_floats / window_room(job.heads_per_kv, job.rows, job.most_tokens));
  for (int first = 0; first < job.kv_heads; first += together) {
    const Scores scores{first, min(together, job.kv_heads - first)};
    const auto heads = static_cast<unsigned>(scores.heads), rows = static_cast<unsigned>(job.heads_per_kv * job.rows);
    const auto dots = [&](auto dim) {
      auto* const kernel = dots_kernel<dim.value>;
      allow_shared(kernel, DotSpace<dim.value>::bytes, "score a prompt: shared memory");
      kernel<<<dim3(pages, heads), kThreads, DotSpace<dim.value>::bytes, stream>>>(job, scores);
    };
    if (!HeadDims::visit(job.head_dim, dots))
      throw Error(Status::kUnsupported, "score a prompt: head_dim " + std::to_string(job.head_dim) + " has no kernel");
    softmax_kernel<<<dim3(rows, heads), kThreads, 0, stream>>>(job, scores);
    const auto blocks = static_cast<unsigned>((job.most_tokens + kThreads - 1) / kThreads);
    sums_kernel<<<dim3(blocks, heads, static_cast<unsigned>(job.heads_per_kv)), kThreads, 0, stream>>>(job, scores);
    check_cuda(cudaGetLastError(), "score a prompt: launch");
  }
}

}  // namespace kvmix::cuda
