#include "policy/select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

namespace kvmix {

Pooling parse_pooling(const std::string& name) {
  if (name == "none") return Pooling::kNone;
  if (name == "avg") return Pooling::kAverage;
  if (name == "max") return Pooling::kMax;
  throw Error(Status::kInternal, "pooling \"" + name + "\" is none of none, avg, max");
}

double finite(float score) {
  if (std::isnan(score)) return 0;
  constexpr float kMost = std::numeric_limits<float>::max();
  return std::clamp(score, -kMost, kMost);
}

Candidates candidates(const HeadView& head, const Protection& protection, int64_t end) {
  const auto index = [&](int64_t position) {
    return static_cast<size_t>(std::lower_bound(head.positions.begin(), head.positions.end(), position) -
                               head.positions.begin());
  };
  Candidates range{index(protection.sinks), index(end - protection.window)};
  range.last = std::max(range.first, range.last);
  return range;
}

Candidates candidates(const PolicyView& view, size_t head, const Protection& protection) {
  return candidates(view.heads[head], protection, view.length + view.incoming);
}

void window_scores(const HeadView& head, int heads_per_kv, std::vector<double>& score) {
  const size_t n = head.size();
  score.assign(n, 0);
  for (int h = 0; h < heads_per_kv; ++h) {
    for (size_t i = 0; i < n; ++i) score[i] += finite(head.window[h * n + i]);
  }
  for (double& s : score) s /= heads_per_kv;
}

void pool(std::span<const double> score, Pooling pooling, int kernel, std::vector<double>& out) {
  const auto n = static_cast<int64_t>(score.size());
  out.assign(score.begin(), score.end());
  if (pooling == Pooling::kNone || kernel == 1) return;
  const int64_t half = kernel / 2;
  for (int64_t i = 0; i < n; ++i) {
    const auto low = score.begin() + std::max<int64_t>(0, i - half), high = score.begin() + std::min(n, i + half + 1);
    out[i] = pooling == Pooling::kMax ? *std::max_element(low, high) : std::accumulate(low, high, 0.0) / kernel;
  }
}

void keep_best(std::span<const double> score, Candidates range, int64_t count, std::vector<int32_t>& order,
               std::vector<uint8_t>& keep) {
  if (count <= 0) return;
  if (count >= static_cast<int64_t>(range.size())) {
    std::fill(keep.begin() + static_cast<ptrdiff_t>(range.first), keep.begin() + static_cast<ptrdiff_t>(range.last), 1);
    return;
  }
  order.resize(range.size());
  std::iota(order.begin(), order.end(), static_cast<int32_t>(range.first));
  std::nth_element(order.begin(), order.begin() + count, order.end(),
                   [&](int32_t a, int32_t b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
  for (int64_t i = 0; i < count; ++i) keep[order[i]] = 1;
}

void keep_protected(size_t n, Candidates range, std::vector<uint8_t>& keep) {
  keep.assign(n, 1);
  std::fill(keep.begin() + static_cast<ptrdiff_t>(range.first), keep.begin() + static_cast<ptrdiff_t>(range.last), 0);
}

void drop_rest(std::span<const uint8_t> keep, std::vector<int32_t>& drop) {
  for (size_t i = 0; i < keep.size(); ++i) {
    if (keep[i] == 0) drop.push_back(static_cast<int32_t>(i));
  }
}

void keep_capacity(size_t n, Candidates range, std::span<const double> score, int64_t capacity, PolicyScratch& scratch,
                   std::vector<int32_t>& drop) {
  if (static_cast<int64_t>(n) <= capacity) return;
  keep_protected(n, range, scratch.keep);
  keep_best(score, range, capacity - static_cast<int64_t>(n - range.size()), scratch.order, scratch.keep);
  drop_rest(scratch.keep, drop);
}

std::vector<int64_t> largest_remainder(std::span<const double> quotas, std::span<const int64_t> limits, int64_t total) {
  std::vector<int64_t> shares(quotas.size());
  std::vector<size_t> order(quotas.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::vector<double> remainder(quotas.size());
  int64_t left = total;
  for (size_t i = 0; i < quotas.size(); ++i) {
    // A quota like 0.8 * 5 + 0.2 * 5 may come out a hair below the whole number that it is.
    const double whole = std::floor(quotas[i] + 1e-9);
    remainder[i] = quotas[i] - whole;
    shares[i] = std::clamp<int64_t>(static_cast<int64_t>(whole), 0, limits[i]);
    left -= shares[i];
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainder[a] > remainder[b]; });
  while (left > 0) {
    const int64_t before = left;
    for (const size_t i : order) {
      if (left == 0) break;
      if (shares[i] == limits[i]) continue;
      ++shares[i];
      --left;
    }
    if (left == before) break;
  }
  return shares;
}

Aligned align(const PolicyView& view) {
  Aligned aligned;
  for (const HeadView& head : view.heads) {
    std::vector<int64_t> all;
    std::set_union(aligned.positions.begin(), aligned.positions.end(), head.positions.begin(), head.positions.end(),
                   std::back_inserter(all));
    aligned.positions = std::move(all);
  }
  for (const HeadView& head : view.heads) {
    std::vector<int32_t>& index = aligned.index.emplace_back(aligned.size(), -1);
    size_t next = 0;
    for (size_t i = 0; i < aligned.size() && next < head.size(); ++i) {
      if (head.positions[next] == aligned.positions[i]) index[i] = static_cast<int32_t>(next++);
    }
  }
  return aligned;
}

}  // namespace kvmix
