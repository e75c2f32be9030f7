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
constexpr size_t kRunsOfList = 3;                      // of pages of one kind: sinks, thin ones, recent ones
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
  const int together = shape.own_layer >= 0 ? shape.kv_heads : 1;
  p.q_heads = shape.q_heads / together, p.kv_heads = shape.kv_heads / together;
  p.sinks = shape.sinks, p.sliding_window = shape.sliding_window;
  return p;
}

std::span<const int32_t> CudaBackend::lengths(const Shape& shape, size_t first, size_t entries) const {
  if (shape.own_layer < 0) return std::span(lengths_).subspan(first, entries);
  const auto heads = static_cast<size_t>(shape.kv_heads);
  return std::span(shape.lengths).subspan(first * heads, entries * heads);
}

void CudaBackend::read_lengths(Shape& shape) const {
  const std::vector<int32_t>& dropped = layers_[static_cast<size_t>(shape.own_layer)].dropped;
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
    const bool many = query_rows(p) > kTileRows, thin = has_thin(shape, first), images = !thin && may_use_images(p);
    const auto image_bytes = static_cast<size_t>(page_image_bytes(shape.format.head_dim) * p.kv_heads);
    size_t end = first, bytes = 0;
    for (; end < order_.size(); ++end) {
      if (plan_->entries[order_[end]].n_tokens != tokens) break;
      // Where no page is thin, many rows have kernels of their own.
      if (many && has_thin(shape, end) != thin) break;
      if (!images && !(thin && many)) continue;
      for (const int32_t length : lengths(shape, end, 1)) {
        bytes += images ? static_cast<size_t>(pages_of(length, shape.sinks)) * image_bytes
                        : kRunsOfList * workspace_layout(p, true).partial_bytes;
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
  const size_t lists = shape.own_layer >= 0 ? static_cast<size_t>(shape.kv_heads) : 1;
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
    launch.thin_items = launch.thin_work_items = 0;
    bool splits = false;
    for (size_t entry = launch.first; entry < launch.first + launch.entries; ++entry) splits = splits || has_thin(shape, entry);
    if (splits) cut_runs(shape, launch, p);
  }
}

bool CudaBackend::has_thin(const Shape& shape, size_t entry) const {
  if (shape.own_layer < 0) return false;
  const Layer& layer = layers_[static_cast<size_t>(shape.own_layer)];
  const auto heads = static_cast<size_t>(shape.kv_heads);
  if (!layer.ids.thins) return false;
  const auto lists = std::span(layer.thin_runs).subspan(entry * heads, heads);
  return std::any_of(lists.begin(), lists.end(), [](const ThinRuns& runs) { return !runs.empty(); });
}

bool CudaBackend::same_runs(const Shape& a, const Shape& b) const {
  if (a.own_layer < 0 || b.own_layer < 0) return a.own_layer < 0 && b.own_layer < 0;
  const Layer &one = layers_[static_cast<size_t>(a.own_layer)], &other = layers_[static_cast<size_t>(b.own_layer)];
  if (!one.ids.thins || !other.ids.thins) return !one.ids.thins && !other.ids.thins;
  const auto lists = static_cast<ptrdiff_t>(order_.size()) * a.kv_heads;
  return std::equal(one.thin_runs.begin(), one.thin_runs.begin() + lists, other.thin_runs.begin());
}

// Calls visit(list of the launch, its length, begin, end, split, splits, thin) for every piece of pages of one kind.
template <class Visit>
void CudaBackend::each_piece(const Shape& shape, const Launch& launch, const Visit& visit) const {
  const auto heads = static_cast<size_t>(shape.kv_heads);
  const std::span<const int32_t> of_lists = lengths(shape, launch.first, launch.entries);
  const auto runs = std::span(layers_[static_cast<size_t>(shape.own_layer)].thin_runs).subspan(launch.first * heads);
  for (size_t list = 0; list < of_lists.size(); ++list) {
    const auto pages = static_cast<int32_t>(pages_of(of_lists[list], shape.sinks));
    const auto each = [&](const auto& piece) {
      const auto run = [&](int32_t begin, int32_t end, bool thin) {
        for (; begin < end; begin += launch.pieces.pages) piece(begin, std::min(begin + launch.pieces.pages, end), thin);
      };
      int32_t at = 0;
      for (const auto& [begin, end] : runs[list]) {
        run(at, begin, false);
        run(begin, end, true);
        at = end;
      }
      run(at, pages, false);
    };
    int splits = 0, split = 0;
    each([&](int32_t, int32_t, bool) { ++splits; });
    each([&](int32_t begin, int32_t end, bool thin) { visit(list, of_lists[list], begin, end, split++, splits, thin); });
  }
}

// A launch for pages of either kind: what takes part in a list's sum is what the kernels hold of splits.
void CudaBackend::cut_runs(const Shape& shape, Launch& launch, const kvmix_cuda_attend_params& p) const {
  for (int most = 0;; launch.pieces.pages *= 2) {
    most = 0, launch.work_items = launch.thin_work_items = 0;
    each_piece(shape, launch, [&](size_t, int32_t, int32_t, int32_t, int, int splits, bool thin) {
      ++(thin ? launch.thin_work_items : launch.work_items);
      most = std::max(most, splits);
    });
    if (most <= most_splits(p)) break;
    if (launch.pieces.pages > (1 << 20)) throw Error(Status::kInternal, "a list alternates between kinds of pages too often");
  }
  const auto padded = [&](size_t items) { return launch.tokens == 1 ? common_length(items) : items; };
  launch.items = padded(launch.work_items), launch.thin_items = padded(launch.thin_work_items);
  launch.workspace_bytes = workspace_layout(p, true).bytes(static_cast<int32_t>(launch.all_items()));
}

void CudaBackend::write_runs(const Shape& shape, const Launch& launch, std::byte* to) const {
  const std::span whole(reinterpret_cast<kvmix_cuda_item*>(to + launch.items_at), launch.items),
      thin(reinterpret_cast<kvmix_cuda_item*>(to + launch.thin_items_at), launch.thin_items);
  kvmix_cuda_item none{};
  none.sequence = -1;
  std::fill(whole.begin(), whole.end(), none);
  std::fill(thin.begin(), thin.end(), none);
  size_t of_whole = 0, of_thin = 0;
  each_piece(shape, launch, [&](size_t list, int32_t length, int32_t begin, int32_t end, int split, int splits, bool is_thin) {
    kvmix_cuda_item item{};
    item.sequence = item.ticket = static_cast<int32_t>(list);
    item.page_begin = begin, item.page_end = end;
    item.split = split, item.splits = splits;
    item.partial = static_cast<int32_t>(of_whole + of_thin) - split;
    item.length = length;
    item.evict_first = launch.pieces.evict_first;
    (is_thin ? thin[of_thin++] : whole[of_whole++]) = item;
  });
}

// Layers whose lists are as long have the same launches; those of the same format have one cut.
void CudaBackend::cut_shapes() {
  page_runs_.clear();
  for (size_t i = 0; i < shapes_.size(); ++i) {
    Shape& shape = shapes_[i];
    if (shape.own_layer >= 0) read_lengths(shape);
    const auto end = shapes_.begin() + static_cast<ptrdiff_t>(i);
    const auto same = std::find_if(shapes_.begin(), end,
                                   [&](const Shape& other) { return other.same_cut(shape) && same_runs(other, shape); });
    if (same != end) {
      shape.launches = same->launches;
      continue;
    }
    const auto alike = std::find_if(shapes_.begin(), end, [&](const Shape& other) {
      return other.format.head_dim == shape.format.head_dim && other.cut_alike(shape) && other.lengths == shape.lengths &&
             same_runs(other, shape);
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
  if (launch.split()) return write_runs(shape, launch, to);
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
