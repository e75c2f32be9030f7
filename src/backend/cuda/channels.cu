// A thread block a record, a thread the words of a lane of a block of codes. Compiled without fused multiply-adds: squares are
// added as on the CPU, so that both devices choose the same channels.
#include "backend/cuda/channels.h"
#include "backend/cuda/gather.h"
#include "backend/cuda/layer_format.h"
#include "backend/cuda/row_store.cuh"
#include "base/cuda/launch.h"
#include "codec/cuda/format.h"
#include "codec/cuda/pick.h"
#include "codec/cuda/seal.h"

namespace kvmix::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) pick_kernel(const __grid_constant__ PickRecords job) {
  __shared__ float largest[kWarps];
  const int thread = static_cast<int>(threadIdx.x), record = static_cast<int>(blockIdx.x);
  if (job.ids[record] == kNoRecord) return;
  const uint8_t* const from = job.from + record * job.stride;
  uint8_t* const to = job.pages + static_cast<int64_t>(job.ids[record]) * static_cast<int64_t>(kPageUnit);
  const SideShape whole = job.whole.key(), thin = job.thin.key();
  const int width = thin.head_dim;
  const uint8_t* const chosen = job.chosen + static_cast<int64_t>(record) * width;

  for (int at = thread; at < width / 16 * 32; at += kThreads) {
    Widths::visit(whole.bits,
                  [&](auto bits) { pick_words<bits.value>(from + kHeaderBytes, chosen, at / 32, at % 32, to + kHeaderBytes); });
  }
  const auto* const scales = reinterpret_cast<const uint16_t*>(from + kHeaderBytes + whole.meta());
  auto* const picked = reinterpret_cast<uint16_t*>(to + kHeaderBytes + thin.meta());
  float most = 0.0f;
  for (int at = thread; at < thin.groups() * width; at += kThreads) {
    const int group = at / width, i = at % width;
    const int in = group * whole.group_halves() + scale_slot(chosen[i]), out = group * thin.group_halves() + scale_slot(i);
    picked[out] = scales[in], picked[out + kMidStep] = scales[in + kMidStep];
    most = fmaxf(most, __half2float(__ushort_as_half(scales[in])));
  }
  const auto* const values = reinterpret_cast<const uint4*>(from + job.whole.key_bytes());
  auto* const values_to = reinterpret_cast<uint4*>(to + job.thin.key_bytes());
  for (int at = thread; at < job.whole.value().bytes() / 16; at += kThreads) values_to[at] = values[at];

  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  if (thread % 32 == 0) largest[thread / 32] = most;
  __syncthreads();
  if (thread != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) most = fmaxf(most, largest[warp]);
  RecordHeader header = *reinterpret_cast<const RecordHeader*>(from);
  if (thin.bits != 16) header.key_exponent = scale_exponent(most);
  header.key_width = width;
  *reinterpret_cast<RecordHeader*>(to) = header;
}

__global__ void __launch_bounds__(kThreads) square_kernel(const __grid_constant__ SquareQueries job) {
  const int all = job.q_heads * job.head_dim, at = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (at >= all) return;
  float sum = 0.0f;
  for (int row = 0; row < job.rows; ++row) {
    const float x = __half2float(job.queries[(job.begin + row) % job.window * all + at]);
    sum += x * x;
  }
  job.means[at] = sum / static_cast<float>(max(job.rows, 1));
}

// A block a page, a thread a channel.
__global__ void square_page_kernel(const __grid_constant__ SquareKeys job) {
  const SquarePage page = job.pages[blockIdx.x];
  const int channel = static_cast<int>(threadIdx.x);
  const SideShape side = page.rows == RowSource::kSealedRecord ? job.sealed.key() : job.open.key();
  float sum = 0.0f;
  for (int slot = 0; slot < page.live; ++slot) {
    if ((page.dropped[slot / 32] >> (slot % 32) & 1u) != 0) continue;
    const float x = page.rows > 0 ? __half2float(reinterpret_cast<const __half*>(page.page)[slot * job.head_dim + channel])
                                  : even_number(side, true, page.page + kHeaderBytes, slot, channel);
    sum += x * x;
  }
  job.sums[static_cast<int64_t>(blockIdx.x) * job.head_dim + channel] = sum;
}

__global__ void square_list_kernel(const __grid_constant__ SquareKeys job) {
  const int list = static_cast<int>(blockIdx.x), channel = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int page = job.first[list]; page < job.first[list + 1]; ++page) {
    sum += job.sums[static_cast<int64_t>(page) * job.head_dim + channel];
  }
  job.means[list * job.head_dim + channel] = sum / static_cast<float>(max(job.tokens[list], 1));
}

}  // namespace

void square_keys(const SquareKeys& job, cudaStream_t stream) {
  if (job.lists == 0) return;
  const auto channels = static_cast<unsigned>(job.head_dim);
  if (job.page_count > 0) square_page_kernel<<<static_cast<unsigned>(job.page_count), channels, 0, stream>>>(job);
  square_list_kernel<<<static_cast<unsigned>(job.lists), channels, 0, stream>>>(job);
  check_cuda(cudaGetLastError(), "squares of keys: launch");
}

void pick_records(const PickRecords& job, cudaStream_t stream) {
  if (job.count == 0) return;
  pick_kernel<<<static_cast<unsigned>(job.count), kThreads, 0, stream>>>(job);
  check_cuda(cudaGetLastError(), "chosen channels: launch");
}

void square_queries(const SquareQueries& job, cudaStream_t stream) {
  square_kernel<<<static_cast<unsigned>((job.q_heads * job.head_dim + kThreads - 1) / kThreads), kThreads, 0, stream>>>(job);
  check_cuda(cudaGetLastError(), "squares of a prompt's queries: launch");
}

}  // namespace kvmix::cuda
