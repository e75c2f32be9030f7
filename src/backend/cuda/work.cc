// How a step's attention is cut: launches of sequences of as many new tokens, and their work lists.
#include <algorithm>
#include <bit>

#include "attention/cuda/cut.h"
#include "attention/cuda/shape.h"
#include "backend/cuda/cuda_backend.h"
#include "kvmix/error.h"

namespace kvmix::cuda {
namespace {

constexpr size_t kMostImageBytes = size_t{512} << 20;  // of a prefill launch's dequantised pages, if it has several sequences
// Work lists of decoding are filled up to a length that steps have in common.
size_t common_length(size_t items) {
  const size_t step = std::max<size_t>(std::bit_floor(items) / 8, 8);
  return (items + step - 1) / step * step;
}

int64_t pages_of(int64_t length, int sinks) {
  if (sinks == 0) return (length + kPageTokens - 1) / kPageTokens;
  return 1 + (std::max<int64_t>(length - sinks, 0) + kPageTokens - 1) / kPageTokens;
}

}  // namespace

// As choose_pieces takes it: all KV heads of a sequence together, unless each has a length of its own.
kvmix_cuda_attend_params CudaBackend::attend_params(const Shape& shape) const {
  kvmix_cuda_attend_params p{};
  p.format = shape.format;
  const int together = shape.governed >= 0 ? shape.kv_heads : 1;
  p.q_heads = shape.q_heads / together, p.kv_heads = shape.kv_heads / together;
  p.sinks = shape.sinks, p.sliding_window = shape.sliding_window;
  return p;
}

std::span<const int32_t> CudaBackend::lengths(const Shape& shape, size_t first, size_t entries) const {
  if (shape.governed < 0) return std::span(lengths_).subspan(first, entries);
  const auto heads = static_cast<size_t>(shape.kv_heads);
  return std::span(shape.lengths).subspan(first * heads, entries * heads);
}

void CudaBackend::read_lengths(Shape& shape) const {
  const std::vector<int32_t>& dropped = layers_[static_cast<size_t>(shape.governed)].dropped;
  const auto heads = static_cast<size_t>(shape.kv_heads);
  shape.lengths.resize(order_.size() * heads);
  for (size_t i = 0; i < order_.size(); ++i) {
    for (size_t h = 0; h < heads; ++h) shape.lengths[i * heads + h] = lengths_[i] - dropped[i * heads + h];
  }
}

// Launches of sequences of as many new tokens, and what their pages are.
void CudaBackend::part(Shape& shape) {
  shape.launches.clear();
  int64_t before = 0;
  for (size_t first = 0; first < order_.size();) {
    const int tokens = plan_->entries[order_[first]].n_tokens;
    kvmix_cuda_attend_params p = attend_params(shape);
    p.q_tokens = tokens;
    const bool images = uses_images(p);
    const auto image_bytes = static_cast<size_t>(page_image_bytes(shape.format.head_dim) * p.kv_heads);
    size_t end = first, bytes = 0;
    for (; end < order_.size(); ++end) {
      if (plan_->entries[order_[end]].n_tokens != tokens) break;
      if (!images) continue;
      for (const int32_t length : lengths(shape, end, 1)) {
        bytes += static_cast<size_t>(pages_of(length, shape.sinks)) * image_bytes;
      }
      if (end > first && bytes > kMostImageBytes) break;
    }
    p.sequences = static_cast<int32_t>(end - first);
    check_shape(p);
    shape.launches.push_back(
        {.first = first, .entries = end - first, .tokens = tokens, .before = before, .runs = page_runs_.size()});
    page_runs_.push_back(page_runs(p, lengths(shape, first, end - first)));
    before += static_cast<int64_t>(end - first) * tokens;
    first = end;
  }
}

void CudaBackend::cut(Shape& shape) {
  const size_t lists = shape.governed >= 0 ? static_cast<size_t>(shape.kv_heads) : 1;
  for (Launch& launch : shape.launches) {
    kvmix_cuda_attend_params p = attend_params(shape);
    p.q_tokens = launch.tokens;
    p.sequences = static_cast<int32_t>(launch.entries * lists);
    const PageRuns& runs = page_runs_[launch.runs];
    launch.pieces = choose_pieces(p, runs, 0);
    launch.work_items = count_items(p, runs, launch.pieces);
    launch.items = launch.tokens == 1 ? common_length(launch.work_items) : launch.work_items;
    launch.workspace_bytes = workspace_bytes(p, runs, launch.items);
    launch.shares_items = false;
  }
}

// Layers whose lists are as long have the same launches; those of the same format have one cut.
void CudaBackend::cut_shapes() {
  page_runs_.clear();
  for (size_t i = 0; i < shapes_.size(); ++i) {
    Shape& shape = shapes_[i];
    if (shape.governed >= 0) read_lengths(shape);
    const auto end = shapes_.begin() + static_cast<ptrdiff_t>(i);
    const auto same = std::find_if(shapes_.begin(), end, [&](const Shape& other) { return other.same_cut(shape); });
    if (same != end) {
      shape.launches = same->launches;
      continue;
    }
    const auto alike = std::find_if(shapes_.begin(), end, [&](const Shape& other) {
      return other.format.head_dim == shape.format.head_dim && other.cut_alike(shape) && other.lengths == shape.lengths;
    });
    if (alike != end) {
      shape.launches = alike->launches;
    } else {
      part(shape);
    }
    cut(shape);
  }
}

void CudaBackend::write_work(const Shape& shape, const Launch& launch, std::byte* to) {
  kvmix_cuda_attend_params p = attend_params(shape);
  p.q_tokens = launch.tokens;
  const std::span list(reinterpret_cast<kvmix_cuda_item*>(to + launch.items_at), launch.items);
  const std::span work = list.first(launch.work_items);
  write_items(p, lengths(shape, launch.first, launch.entries), launch.pieces, work);
  for (kvmix_cuda_item& item : work) {
    item.sequence = item.sequence * p.kv_heads + item.kv_head;
    item.kv_head = 0;
  }
  kvmix_cuda_item none{};
  none.sequence = -1;
  std::fill(list.begin() + static_cast<ptrdiff_t>(launch.work_items), list.end(), none);
}

}  // namespace kvmix::cuda
