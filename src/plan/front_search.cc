#include "plan/front_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <tuple>

namespace kvmix {
namespace {

constexpr double kCrossover = 0.9;
constexpr int kIdleGenerations = 50;  // without a new feasible assignment: the search has converged

struct Individual {
  Assignment choice;
  double size = 0, loss = 0, excess = 0;  // excess: how far the size is beyond what is feasible
  int rank = 0;
  double crowding = 0;
};

// Feasible before infeasible, less excess before more, else better in one respect and not worse in the other.
bool dominates(const Individual& a, const Individual& b) {
  if (a.excess > 0 || b.excess > 0) return a.excess < b.excess;
  return a.size <= b.size && a.loss <= b.loss && (a.size < b.size || a.loss < b.loss);
}

class Random {  // the same on every machine
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}
  double unit() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state_ >> 11) * 0x1p-53;
  }
  size_t below(size_t n) { return std::min(static_cast<size_t>(unit() * static_cast<double>(n)), n - 1); }

 private:
  uint64_t state_;
};

class Nsga2 {
 public:
  explicit Nsga2(const FrontTask& task) : task_(task), random_(task.seed) {}

  void enumerate() {
    Assignment choice(task_.choices.size(), 0);
    for (;;) {
      meet(choice);
      size_t v = 0;
      while (v < choice.size() && ++choice[v] == task_.choices[v]) choice[v++] = 0;
      if (v == choice.size()) return;
    }
  }

  void evolve() {
    const auto size = static_cast<size_t>(task_.population);
    std::vector<Individual> population{meet(Assignment(task_.choices.size(), 0))};
    while (population.size() < size && !spent()) population.push_back(meet(drawn()));
    rank(population);
    for (int idle = 0; idle < kIdleGenerations && !spent(); ++idle) {
      const int before = evaluations_;
      std::vector<Individual> both = population;
      while (both.size() < 2 * size && !spent()) both.push_back(meet(child(population)));
      rank(both);
      std::stable_sort(both.begin(), both.end(), [](const Individual& a, const Individual& b) {
        return a.rank != b.rank ? a.rank < b.rank : a.crowding > b.crowding;
      });
      both.resize(std::min(both.size(), size));
      population = std::move(both);
      if (evaluations_ > before) idle = 0;
    }
  }

  std::vector<FrontPoint> front() const {
    std::vector<FrontPoint> points;
    for (const Individual* a : order_) {
      if (a->excess == 0) points.push_back({a->choice, a->size, a->loss});
    }
    std::stable_sort(points.begin(), points.end(), [](const FrontPoint& a, const FrontPoint& b) {
      return a.size != b.size ? a.size < b.size : a.loss < b.loss;
    });
    double least = std::numeric_limits<double>::infinity();
    std::erase_if(points, [&](const FrontPoint& p) {
      if (p.loss >= least) return true;
      least = p.loss;
      return false;
    });
    return points;
  }

 private:
  bool spent() const { return evaluations_ >= task_.evaluations; }

  const Individual& meet(const Assignment& choice) {
    const auto [at, fresh] = met_.try_emplace(choice);
    Individual& one = at->second;
    if (!fresh) return one;
    one.choice = choice;
    one.size = task_.size(choice);
    one.excess = std::max(0.0, one.size - task_.largest_size);
    if (one.excess == 0) {
      one.loss = task_.loss(choice);
      ++evaluations_;
    }
    order_.push_back(&one);
    return one;
  }

  // At random below a level that is itself random: sizes of all kinds, and some feasible under a tight limit.
  Assignment drawn() {
    const double level = random_.unit();
    Assignment choice(task_.choices.size());
    for (size_t v = 0; v < choice.size(); ++v)
      choice[v] =
          random_.below(static_cast<size_t>(std::ceil(level * static_cast<double>(task_.choices[v]))) + 1) % task_.choices[v];
    return choice;
  }

  const Individual& tournament(const std::vector<Individual>& population) {
    const Individual& a = population[random_.below(population.size())];
    const Individual& b = population[random_.below(population.size())];
    return a.rank < b.rank || (a.rank == b.rank && a.crowding >= b.crowding) ? a : b;
  }

  Assignment child(const std::vector<Individual>& population) {
    Assignment choice = tournament(population).choice;
    const Assignment& other = tournament(population).choice;
    if (random_.unit() < kCrossover) {
      for (size_t v = 0; v < choice.size(); ++v) {
        if (random_.unit() < 0.5) choice[v] = other[v];
      }
    }
    for (size_t v = 0; v < choice.size(); ++v) {
      if (random_.unit() * static_cast<double>(choice.size()) < 1.0) choice[v] = random_.below(task_.choices[v]);
    }
    return choice;
  }

  // Fronts by domination, and inside a front how much room a point has to its neighbours.
  static void rank(std::vector<Individual>& all) {
    // In this order nobody is dominated by one behind it, and of a front the last one stands for all that could dominate.
    std::vector<size_t> order(all.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::tie(all[a].excess, all[a].size, all[a].loss) < std::tie(all[b].excess, all[b].size, all[b].loss);
    });
    std::vector<const Individual*> last;  // of each front
    for (const size_t i : order) {
      const auto front = std::find_if(last.begin(), last.end(), [&](const Individual* a) { return !dominates(*a, all[i]); });
      all[i].rank = static_cast<int>(front - last.begin());
      if (front == last.end()) {
        last.push_back(&all[i]);
      } else {
        *front = &all[i];
      }
    }
    std::vector<std::vector<size_t>> fronts(last.size());
    for (size_t i = 0; i < all.size(); ++i) {
      fronts[static_cast<size_t>(all[i].rank)].push_back(i);
      all[i].crowding = 0;
    }
    for (std::vector<size_t>& here : fronts) {
      for (const double Individual::*objective : {&Individual::size, &Individual::loss}) {
        std::stable_sort(here.begin(), here.end(), [&](size_t a, size_t b) { return all[a].*objective < all[b].*objective; });
        const double range = std::max(all[here.back()].*objective - all[here.front()].*objective, 1e-300);
        all[here.front()].crowding = all[here.back()].crowding = std::numeric_limits<double>::infinity();
        for (size_t k = 1; k + 1 < here.size(); ++k)
          all[here[k]].crowding += (all[here[k + 1]].*objective - all[here[k - 1]].*objective) / range;
      }
    }
  }

  const FrontTask& task_;
  Random random_;
  std::map<Assignment, Individual> met_;
  std::vector<const Individual*> order_;  // as met
  int evaluations_ = 0;
};

}  // namespace

std::vector<FrontPoint> search_front(const FrontTask& task) {
  double all = 1;
  for (const size_t n : task.choices) all *= static_cast<double>(n);
  Nsga2 search(task);
  if (all <= task.evaluations) {
    search.enumerate();
  } else {
    search.evolve();
  }
  return search.front();
}

}  // namespace kvmix
