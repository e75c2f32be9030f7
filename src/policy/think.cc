// ThinK (arXiv 2407.21018, section 3): a channel counts by the squared Frobenius norm of what it adds to the logits of the
// prompt's last queries, sum over queries of q^2 times sum over keys of k^2. Query heads that share a KV head are averaged, so
// that its keys are stored once.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "policy/channels.h"

namespace kvmix {
namespace {

class Think final : public ChannelPolicy {
 public:
  explicit Think(const PolicyValues& values) : keep_(values.number("keep")), window_(values.integer("window")) {}
  int window_queries() const override { return window_; }
  // floor((1 - keep) width) go; 0.4 x 10 is 4, whatever its rounding.
  int kept(int width) const override { return width - static_cast<int>(std::floor((1 - keep_) * width + 1e-9)); }

  void choose(const ChannelView& view, std::span<uint8_t> channels) const override {
    const size_t width = view.keys.size();
    std::vector<float> score(width, 0.0f);
    for (size_t h = 0; h < static_cast<size_t>(view.heads_per_kv); ++h) {
      for (size_t c = 0; c < width; ++c) score[c] += view.queries[h * width + c];
    }
    for (size_t c = 0; c < width; ++c) {
      score[c] = score[c] / static_cast<float>(view.heads_per_kv) * view.keys[c];
      if (std::isnan(score[c])) score[c] = 0;
    }
    std::vector<size_t> order(width);
    std::iota(order.begin(), order.end(), size_t{0});
    // The first to go come first; of equals the lower channel.
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return score[a] < score[b]; });
    const auto gone = static_cast<ptrdiff_t>(width - channels.size());
    std::sort(order.begin() + gone, order.end());
    std::transform(order.begin() + gone, order.end(), channels.begin(), [](size_t c) { return static_cast<uint8_t>(c); });
  }

 private:
  double keep_;
  int window_;
};

}  // namespace

extern const ChannelPolicyEntry kThinkPolicy;
const ChannelPolicyEntry kThinkPolicy = {
    {"think",
     "channels of keys that add most to what the prompt's last queries see",
     "arXiv 2407.21018",
     {number_parameter("keep", 0.6, 1e-6, 1, "fraction of a key's channels that sealed pages store, rounded up to 16"),
      integer_parameter("window", 32, 1, 1 << 12, "last queries of a prompt that choose")}},
    [](const PolicyValues& values) -> std::unique_ptr<ChannelPolicy> { return std::make_unique<Think>(values); }};

}  // namespace kvmix
