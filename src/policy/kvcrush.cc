// KVCrush (arXiv 2503.00022): most of the budget goes to the pages with the most attention, the rest to representatives of the
// others: pages are told apart by a fingerprint of bits, ordered by its distance to one anchor, and picked evenly along that
// order.
//
// Fingerprints are of one of two kinds. `heads`: a bit per token and KV head, whether the head ranks the token in its upper
// half. `pattern` (as in OpenVINO GenAI): a bit per token by the layer's summed attention; all heads keep the same pages. Here
// the representatives are part of the budget in both.
#include "policy/kvcrush.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>

#include "policy/parameters.h"
#include "policy/select.h"

namespace kvmix {

CrushAnchor parse_anchor(const std::string& name) {
  if (name == "alternate") return CrushAnchor::kAlternate;
  if (name == "mean") return CrushAnchor::kMean;
  if (name == "inverse-mean") return CrushAnchor::kInverseMean;
  if (name == "zeros") return CrushAnchor::kZeros;
  if (name == "ones") return CrushAnchor::kOnes;
  if (name == "random") return CrushAnchor::kRandom;
  throw Error(Status::kInternal, "anchor \"" + name + "\" is unknown");
}

std::vector<uint8_t> top_half(std::span<const double> score) {
  std::vector<uint8_t> bits(score.size(), 0);
  std::vector<int32_t> order;
  keep_best(score, {0, score.size()}, static_cast<int64_t>(score.size() / 2), order, bits);
  return bits;
}

std::vector<uint8_t> anchor_bits(CrushAnchor anchor, std::span<const uint8_t> bits, size_t length) {
  std::vector<uint8_t> pattern(length, anchor == CrushAnchor::kOnes ? 1 : 0);
  const size_t pages = bits.size() / length;
  // The generator's output is the same everywhere; a distribution's would not be.
  std::mt19937 random(0);
  for (size_t i = 0; i < length; ++i) {
    size_t ones = 0;
    for (size_t p = 0; p < pages; ++p) ones += bits[p * length + i];
    if (anchor == CrushAnchor::kAlternate) pattern[i] = i % 2;
    if (anchor == CrushAnchor::kMean) pattern[i] = 2 * ones > pages;
    if (anchor == CrushAnchor::kInverseMean) pattern[i] = 2 * ones < pages;
    if (anchor == CrushAnchor::kRandom) pattern[i] = static_cast<uint8_t>(random() & 1);
  }
  return pattern;
}

std::vector<int> anchor_distances(std::span<const uint8_t> bits, std::span<const uint8_t> anchor) {
  std::vector<int> distances(bits.size() / anchor.size(), 0);
  for (size_t i = 0; i < bits.size(); ++i) distances[i / anchor.size()] += bits[i] != anchor[i % anchor.size()];
  return distances;
}

std::vector<size_t> by_distance(std::span<const int> distances, std::span<const uint8_t> taken) {
  std::vector<size_t> sorted;
  for (size_t p = 0; p < distances.size(); ++p) {
    if (taken[p] == 0) sorted.push_back(p);
  }
  std::stable_sort(sorted.begin(), sorted.end(), [&](size_t a, size_t b) { return distances[a] < distances[b]; });
  return sorted;
}

std::vector<size_t> spread(std::span<const size_t> sorted, size_t count) {
  if (count >= sorted.size()) return {sorted.begin(), sorted.end()};
  std::vector<size_t> picked;
  for (size_t t = 0; t < count; ++t) picked.push_back(sorted[count == 1 ? 0 : t * (sorted.size() - 1) / (count - 1)]);
  return picked;
}

std::vector<size_t> strided(std::span<const size_t> sorted, size_t count) {
  if (count >= sorted.size()) return {sorted.begin(), sorted.end()};
  std::vector<size_t> picked;
  for (size_t t = 0; t < count; ++t) picked.push_back(sorted[t * (sorted.size() / count)]);
  return picked;
}

namespace {

class KvCrush final : public Policy {
 public:
  explicit KvCrush(const PolicyValues& values)
      : kept_{values.integer("sinks"), values.integer("window")},
        budget_(values.budget(kept_.sinks + kept_.window)),
        queries_(values.integer("queries")),
        page_(static_cast<size_t>(values.integer("page"))),
        ahead_(values.integer("ahead")),
        share_(values.number("share")),
        anchor_(parse_anchor(values.choice("anchor"))),
        pattern_(values.choice("fingerprint") == "pattern"),
        shared_(values.choice("layout") == "shared") {
    if (queries_ > kept_.window) {
      values.fail("queries is " + std::to_string(queries_) + ", more than the window of " + std::to_string(kept_.window) +
                  " tokens; not all of them would see what competes");
    }
  }

  Needs needs() const override { return {.window_queries = queries_}; }
  bool heads_share() const override { return pattern_ || shared_; }
  Protection protection(const LayerShape&, int64_t) const override { return kept_; }
  int64_t most_tokens(const LayerShape& shape, int64_t prompt_length) const override {
    return shape.kv_heads * std::min(prompt_length, budget_.capacity(shape, prompt_length, kept_));
  }

 protected:
  void decide_prompt(const PolicyView& view, PolicyScratch& scratch, Decision& decision) const override {
    const int64_t capacity = budget_.capacity(view.shape, view.prompt_length, kept_);
    const Aligned tokens = align(view);
    if (static_cast<int64_t>(tokens.size()) <= capacity) return;
    const HeadView all{.positions = tokens.positions, .tiers = {}, .mass = {}, .queries = {}, .window = {}};
    const Candidates middle = candidates(all, kept_, view.length);

    Share share{.pages = static_cast<size_t>(capacity - kept_.sinks - kept_.window) / page_, .representatives = 0};
    if (share_ > 0) {
      const auto part = static_cast<size_t>(share_ * static_cast<double>(share.pages * page_) + 1e-9) / page_;
      share.representatives = std::min(share.pages, std::max<size_t>(1, part));
    }
    // Fingerprints need every head's score of a token: where a head has dropped it before, it is one that the head ignores.
    std::vector<std::vector<double>> score(view.heads.size());
    for (size_t h = 0; h < score.size(); ++h) {
      window_scores(view.heads[h], view.shape.heads_per_kv, scratch.score);
      score[h].resize(tokens.size());
      for (size_t i = 0; i < tokens.size(); ++i) score[h][i] = tokens.index[h][i] < 0 ? 0 : scratch.score[tokens.index[h][i]];
    }
    const std::vector<std::vector<uint8_t>> keep =
        pattern_ ? by_pattern(tokens, middle, score, share) : by_heads(middle, score, share);
    for (size_t h = 0; h < score.size(); ++h) {
      for (size_t i = middle.first; i < middle.last; ++i) {
        const int32_t index = tokens.index[h][i];
        if (index >= 0 && keep[h][(i - middle.first) / page_] == 0) decision.heads[h].drop.push_back(index);
      }
    }
  }

 private:
  struct Share {
    size_t pages, representatives;  // the latter among the former
  };

  std::vector<double> page_sums(std::span<const double> score) const {
    std::vector<double> sums;
    for (size_t i = 0; i < score.size(); i += page_) {
      sums.push_back(
          std::accumulate(score.begin() + static_cast<ptrdiff_t>(i), score.begin() + static_cast<ptrdiff_t>(i + page_), 0.0));
    }
    return sums;
  }

  // The pages that each head keeps. The last page may have fewer tokens: it is filled up with scores of 0.
  std::vector<std::vector<uint8_t>> by_heads(Candidates middle, const std::vector<std::vector<double>>& score,
                                             Share share) const {
    const size_t heads = score.size(), pages = (middle.size() + page_ - 1) / page_, length = page_ * heads;
    std::vector<std::vector<double>> importance;
    std::vector<uint8_t> bits(pages * length);
    for (size_t h = 0; h < heads; ++h) {
      std::vector<double> padded(score[h].begin() + static_cast<ptrdiff_t>(middle.first),
                                 score[h].begin() + static_cast<ptrdiff_t>(middle.last));
      padded.resize(pages * page_);
      importance.push_back(page_sums(padded));
      const std::vector<uint8_t> upper = top_half(padded);
      for (size_t i = 0; i < upper.size(); ++i) bits[i * heads + h] = upper[i];
    }
    if (shared_) {
      for (size_t p = 0; p < pages; ++p) {
        double sum = 0;
        for (const std::vector<double>& of_head : importance) sum += of_head[p];
        for (std::vector<double>& of_head : importance) of_head[p] = sum;
      }
    }
    std::vector<std::vector<uint8_t>> keep(heads, std::vector<uint8_t>(pages, 0));
    std::vector<uint8_t> taken(pages, 0);
    std::vector<int32_t> order;
    for (size_t h = 0; h < heads; ++h) {
      keep_best(importance[h], {0, pages}, static_cast<int64_t>(share.pages - share.representatives), order, keep[h]);
      for (size_t p = 0; p < pages; ++p) taken[p] |= keep[h][p];
    }
    if (share.representatives == 0) return keep;
    const std::vector<uint8_t> anchor = anchor_bits(anchor_, bits, length);
    const std::vector<size_t> picked = spread(by_distance(anchor_distances(bits, anchor), taken), share.representatives);
    for (size_t h = 0; h < heads; ++h) {
      for (const size_t p : picked) keep[h][p] = 1;
      // Where the heads' important pages leave too few, each head goes on with its own next best.
      std::vector<double> rest = importance[h];
      for (size_t p = 0; p < pages; ++p) {
        if (keep[h][p] != 0) rest[p] = std::numeric_limits<double>::lowest();
      }
      keep_best(rest, {0, pages}, static_cast<int64_t>(share.representatives - picked.size()), order, keep[h]);
    }
    return keep;
  }

  // Everything is the layer's sum here, and a token's score is the best of those up to `ahead` from it on. All that competes
  // has been seen by the same queries, so sums rank like means.
  std::vector<std::vector<uint8_t>> by_pattern(const Aligned& tokens, Candidates middle,
                                               const std::vector<std::vector<double>>& score, Share share) const {
    const size_t pages = (middle.size() + page_ - 1) / page_;
    std::vector<double> summed(tokens.size(), 0), ahead(pages * page_, 0);
    for (const std::vector<double>& of_head : score) {
      for (size_t i = 0; i < summed.size(); ++i) summed[i] += of_head[i];
    }
    for (size_t i = 0; i < middle.size(); ++i) {
      const size_t from = middle.first + i, to = std::min(summed.size(), from + static_cast<size_t>(ahead_));
      ahead[i] = *std::max_element(summed.begin() + static_cast<ptrdiff_t>(from), summed.begin() + static_cast<ptrdiff_t>(to));
    }
    const std::vector<double> importance = page_sums(ahead);
    std::vector<size_t> order(pages);
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return importance[a] < importance[b]; });
    std::vector<uint8_t> keep(pages, 1);
    for (size_t i = 0; i < pages - (share.pages - share.representatives); ++i) keep[order[i]] = 0;
    const std::vector<uint8_t> bits = top_half(ahead), anchor = anchor_bits(anchor_, bits, page_);
    const std::vector<size_t> evicted = by_distance(anchor_distances(bits, anchor), keep);
    for (const size_t p : strided(evicted, share.representatives)) keep[p] = 1;
    return {score.size(), keep};
  }

  Protection kept_;
  Budget budget_;
  int queries_;
  size_t page_;
  int ahead_;
  double share_;
  CrushAnchor anchor_;
  bool pattern_, shared_;
};

}  // namespace

extern const PolicyEntry kKvcrushPolicy;
const PolicyEntry kKvcrushPolicy = {
    {"kvcrush",
     "pages with the most attention, and representatives of the others",
     "arXiv 2503.00022",
     {keep_parameter(), tokens_parameter(), sinks_parameter(32), window_parameter(128),
      integer_parameter("queries", 16, 1, 4096, "last queries of the prompt whose attention counts"),
      integer_parameter("page", 16, 1, 128, "tokens that stay or go together"),
      number_parameter("share", 0.25, 0, 1, "part of the budget that is for representatives"),
      choice_parameter("anchor", {"alternate", "mean", "inverse-mean", "zeros", "ones", "random"},
                       "the pattern that fingerprints are compared with"),
      choice_parameter("fingerprint", {"heads", "pattern"},
                       "which heads look at a token, or where in a page the layer looks (OpenVINO)"),
      choice_parameter("layout", {"per-head", "shared"}, "each KV head has its own important pages, or all the same"),
      integer_parameter("ahead", 7, 1, 255, "with fingerprint pattern: a token's score is the best of so many from it on")}},
    [](const PolicyValues& values) -> std::unique_ptr<Policy> { return std::make_unique<KvCrush>(values); }};

}  // namespace kvmix
