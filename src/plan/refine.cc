#include "plan/refine.h"

#include <cmath>
#include <limits>
#include <set>

#include "base/mean.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr double kLeastRatio = 0.1;  // of expected gain to expected loss; below it a swap is not worth measuring

struct Move {
  size_t item, to;
};

struct Swap {
  Move up{}, down{};
  bool single = false;  // no item has to shrink
  double ratio = 0, expected = 0;
};

class Search {
 public:
  explicit Search(const RefineTask& task, std::vector<size_t> start)
      : task_(task), chosen_(std::move(start)), items_(task.items) {}

  // The untried swap with the best ratio; false if none is worth measuring.
  bool next(Swap& best) const {
    int64_t slack = task_.spend_bytes;
    for (size_t i = 0; i < items_.size(); ++i) slack -= now(i).bytes;
    best.ratio = kLeastRatio;
    bool found = false;
    const auto offer = [&](const Swap& s) {
      if (s.ratio <= best.ratio || tried_.contains(apply(s))) return;
      best = s;
      found = true;
    };
    for (size_t i = 0; i < items_.size(); ++i) {
      const Move up{i, step(
                           i, [&](int64_t bytes) { return bytes > now(i).bytes; }, true)};
      if (up.to == kNone) continue;
      const double gain = now(i).cost - items_[i][up.to].cost;
      const int64_t need = items_[i][up.to].bytes - now(i).bytes - slack;
      if (gain <= 0) continue;
      if (need <= 0) {
        offer({up, {}, true, std::numeric_limits<double>::infinity(), -gain});
        continue;
      }
      for (size_t j = 0; j < items_.size(); ++j) {
        if (j == i) continue;
        const Move down{j, step(
                               j, [&](int64_t bytes) { return bytes <= now(j).bytes - need; }, false)};
        if (down.to == kNone) continue;
        // A loss that measuring has put below nothing counts as next to nothing.
        const double loss = std::max(items_[j][down.to].cost - now(j).cost, 1e-12);
        offer({up, down, false, gain / loss, loss - gain});
      }
    }
    return found;
  }

  std::vector<size_t> apply(const Swap& s) const {
    std::vector<size_t> choice = chosen_;
    choice[s.up.item] = s.up.to;
    if (!s.single) choice[s.down.item] = s.down.to;
    return choice;
  }

  // What a swap did, measured, corrects the costs it was expected from.
  void learn(const Swap& s, double change, bool keep) {
    const double surprise = (change - s.expected) / (s.single ? 1 : 2);
    tried_.insert(chosen_);
    tried_.insert(apply(s));
    items_[s.up.item][s.up.to].cost += surprise;
    if (!s.single) items_[s.down.item][s.down.to].cost += surprise;
    if (keep) chosen_ = apply(s);
  }

  const std::vector<size_t>& chosen() const { return chosen_; }

 private:
  static constexpr size_t kNone = static_cast<size_t>(-1);

  const Choice& now(size_t i) const { return items_[i][chosen_[i]]; }
  // Of the choices whose bytes are accepted, the cheapest of the next size up or down.
  template <class Accept>
  size_t step(size_t i, const Accept& accept, bool up) const {
    size_t best = kNone;
    for (size_t c = 0; c < items_[i].size(); ++c) {
      const Choice& choice = items_[i][c];
      if (!accept(choice.bytes)) continue;
      const bool nearer = best == kNone || (up ? choice.bytes < items_[i][best].bytes : choice.bytes > items_[i][best].bytes);
      if (nearer || (choice.bytes == items_[i][best].bytes && choice.cost < items_[i][best].cost)) best = c;
    }
    return best;
  }

  const RefineTask& task_;
  std::vector<size_t> chosen_;
  std::vector<std::vector<Choice>> items_;  // costs corrected by what was measured
  std::set<std::vector<size_t>> tried_;
};

// A fall by less may be chance: a few dozen swaps are tried, and positions of a text are not independent.
constexpr double kStandardErrors = 2.0;

// Mean of the differences, and its standard error.
std::pair<double, double> difference(const std::vector<double>& a, const std::vector<double>& b) {
  const auto n = static_cast<double>(a.size());
  double sum = 0, squares = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum += a[i] - b[i];
    squares += (a[i] - b[i]) * (a[i] - b[i]);
  }
  const double mean = sum / n;
  return {mean, std::sqrt(std::max(squares / n - mean * mean, 0.0) / n)};
}

}  // namespace

Refined refine(const RefineTask& task, const std::vector<size_t>& start) {
  if (task.measurements < 2) throw Error(Status::kInvalidArgument, "refining a plan takes at least 2 measurements");
  const auto report = [&](int done) {
    if (task.progress && !task.progress(done, task.measurements, "measuring plans"))
      throw Error(Status::kCancelled, "stopped while measuring plans");
  };
  report(0);
  Search search(task, start);
  std::vector<double> losses = task.measure(start);
  Refined out;
  out.measurements = 1;
  out.before = mean(losses);
  report(1);
  Swap swap;
  while (out.measurements < task.measurements && search.next(swap)) {
    std::vector<double> changed = task.measure(search.apply(swap));
    const auto [change, error] = difference(changed, losses);
    const bool keep = change < -kStandardErrors * error;
    search.learn(swap, change, keep);
    if (keep) {
      losses = std::move(changed);
      ++out.swaps;
    }
    report(++out.measurements);
  }
  out.chosen = search.chosen();
  out.after = mean(losses);
  return out;
}

}  // namespace kvmix
