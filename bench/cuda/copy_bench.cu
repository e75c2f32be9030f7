// What brings records from memory to shared memory, without any arithmetic: the ceiling of the decode kernel.
//   nvcc -std=c++20 -O3 -arch=sm_90 -o copy_bench bench/cuda/copy_bench.cu && ./copy_bench
// 16 sequences x 32 heads x 64 pages of records, each read once by bulk copies as src/attention/cuda/decode.cuh reads them: a
// block of four warps takes a sequence's head, a warp every fourth page, whose halves follow each other. Compared are where
// records begin, how many warps a multiprocessor has, and pages in random against ascending order. "ascending" lets all warps
// sweep the memory from front to back; "plain loads" do so with 16 bytes a thread. Cold L2, median of 9.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

constexpr int kSequences = 16, kHeads = 32, kPages = 64, kRecords = kSequences * kHeads * kPages, kWarps = 4;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "copy_bench: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

struct Records {
  const uint8_t* base;
  const int32_t* pages;  // [sequence][page]: place in memory
  int stride, bytes;
  bool sweep;
  unsigned* sink;
};

__global__ void __launch_bounds__(32 * kWarps) copy_records(const Records r) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ uint64_t barriers[2 * kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = r.bytes / 2 / 128 * 128;
  uint8_t* const ring = shared + warp * ((r.bytes + 127) / 128 * 128);
  const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(barriers + 2 * warp));
  if (lane == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n" ::"r"(barrier) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n" ::"r"(barrier + 8) : "memory");
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
  }
  __syncwarp();
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int first = r.sweep ? block * kWarps + warp : static_cast<int>(static_cast<int64_t>(kRecords) * block / blocks) + warp;
  const int end = r.sweep ? kRecords : static_cast<int>(static_cast<int64_t>(kRecords) * (block + 1) / blocks);
  const int step = r.sweep ? blocks * kWarps : kWarps;
  const auto start = [&](int at, int side) {
    if (lane != 0 || at >= end) return;
    const int page = r.sweep ? at / kHeads % kPages : at % kPages, head = r.sweep ? at % kHeads : at / kPages % kHeads;
    const int64_t place = static_cast<int64_t>(r.pages[at / (kHeads * kPages) * kPages + page]) * kHeads + head;
    const uint8_t* const from = r.base + place * r.stride + side * half;
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(ring + side * half));
    const int bytes = side == 0 ? half : r.bytes - half;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier + 8 * side), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier + 8 * side)
                 : "memory");
  };
  start(first, 0);
  start(first, 1);
  unsigned sum = 0;
  uint32_t phase = 0;
  for (int at = first; at < end; at += step, phase ^= 1) {
    for (int side = 0; side < 2; ++side) {
      asm volatile(
          "{\n .reg .pred done;\nagain%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra "
          "again%=;\n}\n" ::"r"(barrier + 8 * side),
          "r"(phase)
          : "memory");
      sum += ring[side * half + lane];
      __syncwarp();
      start(at + step, side);
    }
  }
  if (sum == 0xffffffffu) *r.sink = sum;  // never; the reads shall stay
}

__global__ void __launch_bounds__(512) plain_loads(const uint4* from, int64_t count, unsigned* sink) {
  constexpr int kAtOnce = 8;
  unsigned sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i + (kAtOnce - 1) * step < count;
       i += kAtOnce * step) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) v[j] = __ldcs(from + i + j * step);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0xffffffffu) *sink = sum;
}

}  // namespace

int main() {
  constexpr int64_t kOther = 256 << 20;
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  uint8_t *records = nullptr, *other = nullptr;
  int32_t* tables = nullptr;
  unsigned* sink = nullptr;
  const int64_t most = static_cast<int64_t>(kRecords) * 17536;
  check(cudaMalloc(&records, most));
  check(cudaMemset(records, 1, most));
  check(cudaMalloc(&other, kOther));
  check(cudaMemset(other, 1, kOther));
  check(cudaMalloc(&sink, 4));
  std::vector<int32_t> table(2 * kSequences * kPages);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i % (kSequences * kPages));
  std::shuffle(table.begin(), table.begin() + kSequences * kPages, std::mt19937(1));  // random, then ascending
  check(cudaMalloc(&tables, table.size() * 4));
  check(cudaMemcpy(tables, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
  check(cudaFuncSetAttribute(copy_records, cudaFuncAttributeMaxDynamicSharedMemorySize, 120000));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  const auto report = [&](const char* name, int bytes, int stride, int warps, const auto& launch) {
    std::vector<float> times(9);
    for (float& ms : times) {
      plain_loads<<<2 * processors, 512>>>(reinterpret_cast<const uint4*>(other), kOther / 16, sink);
      check(cudaEventRecord(begin));
      launch();
      check(cudaEventRecord(end));
      check(cudaEventSynchronize(end));
      check(cudaEventElapsedTime(&ms, begin, end));
    }
    std::sort(times.begin(), times.end());
    const float ms = times[times.size() / 2];
    std::printf("| %d | %d | %s | %d | %.1f | %.2f |\n", bytes, stride, name, warps, ms * 1e3,
                static_cast<double>(kRecords) * bytes / ms / 1e9);
  };
  std::printf("| record bytes | stride | order | warps | us | TB/s |\n|--:|--:|---|--:|--:|--:|\n");
  for (const int bytes : {9232, 17424}) {  // 2/2 and 4/4 at 128 channels, groups of 128
    for (const bool sweep : {false, true}) {
      for (const int align : {16, 32, 128}) {
        for (const int blocks : {4, 2, 1}) {
          const int warp_bytes = (bytes + 127) / 128 * 128, stride = (bytes + align - 1) / align * align;
          if (blocks * kWarps * warp_bytes > 200000) continue;
          const Records r{records, tables + (sweep ? kSequences * kPages : 0), stride, bytes, sweep, sink};
          const int shared = std::max(kWarps * warp_bytes, blocks == 1 ? 116000 : blocks == 2 ? 78000 : 0);
          report(sweep ? "ascending" : "random pages", bytes, stride, kWarps * blocks, [&] {
            copy_records<<<processors * blocks, 32 * kWarps, static_cast<size_t>(shared)>>>(r);
            check(cudaGetLastError());
          });
        }
      }
    }
    report("plain loads", bytes, bytes, 32, [&] {
      plain_loads<<<2 * processors, 512>>>(reinterpret_cast<const uint4*>(records), static_cast<int64_t>(kRecords) * bytes / 16,
                                           sink);
      check(cudaGetLastError());
    });
  }
}
