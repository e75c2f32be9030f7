// No device code: it is built, tested and answers without CUDA too.
#include "attention/cuda/cut.h"

#include <cmath>
#include <string>

namespace kvmix::cuda {
namespace {

constexpr int kPagesAtOnce = 4;

int page_count(const kvmix_cuda_attend_params& p, int length) {
  if (p.sinks == 0) return (length + kPageTokens - 1) / kPageTokens;
  return length == 0 ? 0 : 1 + (std::max(length - p.sinks, 0) + kPageTokens - 1) / kPageTokens;
}

// First page that the oldest query row of the sequence sees.
int first_page(const kvmix_cuda_attend_params& p, int length) {
  if (p.sliding_window == 0) return 0;
  const int first = std::max(length - p.q_tokens + 1 - p.sliding_window, 0);
  if (p.sinks == 0) return first / kPageTokens;
  return first < p.sinks ? 0 : 1 + (first - p.sinks) / kPageTokens;
}

struct Run {
  int begin, end;
};

Run run_of(const kvmix_cuda_attend_params& p, int length) {
  if (length < 0) throw Error(Status::kInvalidArgument, "cut: length " + std::to_string(length) + " is negative");
  return {first_page(p, length), page_count(p, length)};
}

// An empty sequence still gets a piece, which writes zeros and -inf.
int pieces_of(int64_t pages, const Pieces& pieces) {
  return static_cast<int>(std::max<int64_t>(1, (pages + pieces.pages - 1) / pieces.pages));
}

// Of the prefill kernel, as below: a block has a multiprocessor, whose time for a page is that of dequantising it. A block
// that adds up reads all rows' partial results.
Pieces choose_of_chunk(const kvmix_cuda_attend_params& p, const PageRuns& runs, int processors) {
  constexpr double kTurn = 3.0, kBlock = 6.0, kSum = 3.0, kSumSplit = 0.5;
  const double size = static_cast<double>(p.format.head_dim) / 128;
  int chunk = runs.longest;
  double best = -1.0;
  for (int splits = 1; splits <= runs.longest; ++splits) {
    const int candidate = (runs.longest + splits - 1) / splits;
    const auto blocks = static_cast<int64_t>(count_items(p, runs, {candidate, true})) * prefill_blocks(p);
    if (splits > 1 && blocks > kMostSplitBlocks) break;
    const double waves = std::ceil(static_cast<double>(blocks) / processors);
    const double time = waves * (candidate * kTurn * size + kBlock) + (splits > 1 ? kSum + kSumSplit * size * splits : 0.0);
    if (best < 0.0 || time < best) best = time, chunk = candidate;
  }
  return {chunk, true};
}

Pieces choose(const kvmix_cuda_attend_params& p, const PageRuns& runs, const Residency& device) {
  if (splits_chunks(p)) return choose_of_chunk(p, runs, device.processors);
  // The chunk with the smallest estimated time, in us on an H100: waves x (turns of a warp, a page each, + beginning and end of
  // a block) + the sum over splits. A turn takes as long as the memory for the pages of all warps of a multiprocessor, or as
  // the arithmetic of one warp, or with trellis codes of all. The other kernels take a page a block: that of fp16 pages as long
  // as memory does or a block alone waits for it, the page kernel arithmetic alone.
  constexpr double kRate = 25e3, kTurn = 2.5, kFp16Turn = 4.0, kPageTurn = 8.0, kPageShare = 3.5,
                   kTrellisShare = 1.1;  // bytes and us of a multiprocessor
  constexpr double kBlock = 2.5, kBlockWarp = 0.125, kSum = 1.8, kSumSplit = 0.07;
  const bool fast = uses_fast_kernel(p), fp16 = uses_fp16_kernel(p), decodes = fast || fp16;
  const double size = p.format.head_dim > 128 ? 2.0 : 1.0;
  int chunk = runs.longest;
  double best = -1.0;
  const int most = query_rows(p) > kTileRows ? 1 : most_splits(p);
  for (int splits = 1; splits <= std::min(runs.longest, most); ++splits) {
    int candidate = (runs.longest + splits - 1) / splits;
    if (fast && candidate > kPagesAtOnce) candidate = (candidate + kPagesAtOnce - 1) / kPagesAtOnce * kPagesAtOnce;
    int64_t blocks = 0;
    for (const auto& [count, n] : runs.counts) blocks += (count + candidate - 1) / candidate * n * p.kv_heads;
    blocks = std::max<int64_t>(decodes ? blocks * row_blocks(p) : blocks, 1);
    // Long runs are not cut into so many short blocks that the kernel with fewer registers takes them.
    if (splits > 1 && device.few_blocks > 0 && device.each(blocks) > device.few_blocks) break;
    const int warps = fast ? device.block_warps(blocks) : 1;
    const int resident = std::max(1, device.warps(blocks) / warps);  // blocks of a multiprocessor
    const double waves = std::max(1.0, static_cast<double>(blocks) / (static_cast<double>(device.processors) * resident));
    const double full = waves <= 4.0 ? std::ceil(waves) : waves + 0.5;
    const int busy = std::min(device.each(blocks), resident) * std::min(warps, candidate);
    const double memory = busy * static_cast<double>(record_shape(p.format).bytes()) / kRate;
    const double turn = fast   ? std::max({kTurn * size, memory, device.alone ? busy * kTrellisShare * size : 0.0})
                        : fp16 ? std::max(kFp16Turn, memory)
                               : std::max(kPageTurn, busy * kPageShare) * size;
    const double turns = (candidate + warps - 1) / warps;
    const double time = full * (turns * turn + kBlock + kBlockWarp * busy) + (splits > 1 ? kSum + kSumSplit * splits : 0.0);
    if (best < 0.0 || time < best) best = time, chunk = candidate;
  }
  // Pages shall leave the L2 as it was, unless another block reads them again.
  return {chunk, !decodes || row_blocks(p) == 1};
}

// Of a device that holds `slots` thread blocks.
Residency residency_of_slots(const kvmix_cuda_attend_params& p, int slots) {
  const int all = uses_fast_kernel(p) ? kPagesAtOnce : 1;
  return {slots, 0, all, all};
}

}  // namespace

PageRuns page_runs(const kvmix_cuda_attend_params& p, std::span<const int32_t> lengths) {
  PageRuns runs;
  std::vector<int64_t> of_count;  // many sequences have few different numbers of pages
  for (const int32_t length : lengths) {
    const Run r = run_of(p, length);
    const auto count = static_cast<size_t>(r.end - r.begin);
    runs.pages += r.end - r.begin;
    runs.longest = std::max(runs.longest, r.end - r.begin);
    if (of_count.size() <= count) of_count.resize(count + 1);
    ++of_count[count];
  }
  for (size_t count = 0; count < of_count.size(); ++count) {
    if (of_count[count] > 0) runs.counts.emplace_back(static_cast<int64_t>(count), of_count[count]);
  }
  return runs;
}

Pieces choose_pieces(const kvmix_cuda_attend_params& p, const PageRuns& runs, int slots) {
  return choose(p, runs, slots > 0 ? residency_of_slots(p, slots) : residency(p));
}

int most_splits(const kvmix_cuda_attend_params& p) {
  // The page kernel's block adds up the splits of its rows at once: of more than 16, two floats each take more than it has.
  const int rows = std::min(query_rows(p), kTileRows);
  return std::min(kMaxSplits, page_shared_bytes(p.format.head_dim) / (rows * 2 * static_cast<int>(sizeof(float))));
}

size_t count_items(const kvmix_cuda_attend_params& p, const PageRuns& runs, const Pieces& pieces) {
  int64_t items = 0;
  for (const auto& [count, n] : runs.counts) items += pieces_of(count, pieces) * n * p.kv_heads;
  return static_cast<size_t>(items);
}

void write_items(const kvmix_cuda_attend_params& p, std::span<const int32_t> lengths, const Pieces& pieces,
                 std::span<kvmix_cuda_item> to) {
  const bool images = uses_images(p);
  int ticket = 0, image = 0;
  size_t at = 0;
  for (size_t sequence = 0; sequence < lengths.size(); ++sequence) {
    const Run r = run_of(p, lengths[sequence]);
    const int splits = pieces_of(r.end - r.begin, pieces);
    const auto of_head = static_cast<size_t>(splits);
    const size_t first = at;
    for (int split = 0; split < splits; ++split) {
      kvmix_cuda_item& item = to[at++];
      item = {};
      item.sequence = static_cast<int32_t>(sequence);
      item.page_begin = r.begin + split * pieces.pages;
      item.page_end = std::min(item.page_begin + pieces.pages, r.end);
      item.split = split, item.splits = splits, item.ticket = ticket;
      item.partial = images ? image + item.page_begin - r.begin : static_cast<int>(first);
      item.length = lengths[sequence];
      item.evict_first = pieces.evict_first;
    }
    // The other heads' are the same but for whose they are.
    const int partials = images ? r.end - r.begin : splits;
    for (int head = 1; head < p.kv_heads; ++head) {
      for (size_t split = 0; split < of_head; ++split) {
        kvmix_cuda_item& item = to[at++];
        item = to[first + split];
        item.kv_head = head;
        item.ticket += head;
        item.partial += head * partials;
      }
    }
    ticket += p.kv_heads, image += p.kv_heads * (r.end - r.begin);
  }
}

size_t workspace_bytes(const kvmix_cuda_attend_params& p, const PageRuns& runs, size_t items) {
  const size_t images =
      uses_images(p) ? static_cast<size_t>(runs.pages * p.kv_heads) * static_cast<size_t>(page_image_bytes(p.format.head_dim))
                     : 0;
  return workspace_layout(p).bytes(static_cast<int32_t>(items)) + images;
}

}  // namespace kvmix::cuda
