#include "profile/layer_errors.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "base/parallel.h"
#include "cache/layout.h"
#include "codec/encoders.h"
#include "codec/trellis.h"
#include "score/stored_page.h"

namespace kvmix {
namespace {

constexpr int kSampledQueries = 96;
constexpr int kRowStep = 8, kColumnStep = 16;  // that products of rows like
constexpr float kLeastMass = 1e-30f;           // of less the inverse may not be finite

// [rows][columns] to [columns][rows], a square that stays in the cache at a time.
void transpose(const float* from, int rows, int columns, float* to) {
  constexpr int kSquare = 16;
  for (int r = 0; r < rows; r += kSquare) {
    const int end = std::min(rows, r + kSquare);
    for (int c = 0; c < columns; ++c) {
      for (int i = r; i < end; ++i) to[static_cast<ptrdiff_t>(c) * rows + i] = from[static_cast<ptrdiff_t>(i) * columns + c];
    }
  }
}

}  // namespace

// Some of what shares a transform, of one KV head.
struct LayerErrors::Task {
  const RowMapChain* maps;
  int head;
  std::vector<size_t> which;
};

// Heads come together only where all are done, in their order, so that sums are the same with any number of threads.
struct LayerErrors::HeadErrors {
  double squares = 0;
  std::vector<float> losses;  // [sampled][kNeighbours]
};

LayerErrors::LayerErrors(const LayerConfig& layer, const LayerRows& rows, int threads)
    : ops_(float_ops(false)),
      layer_(layer),
      rows_(rows),
      n_(static_cast<int64_t>(rows.keys.size()) / (layer.kv_heads * layer.head_dim)),
      threads_(threads) {
  const int64_t half = n_ / 2, step = std::max<int64_t>(1, (n_ - half) / kSampledQueries);
  for (int64_t t = half; t < n_; t += step) sampled_.push_back(t);
  blocks_ = blocks();
  parallel_for(threads, blocks_.size(), [&](size_t b) { attend(blocks_[b]); });
  for (const Block& block : blocks_) {
    for (size_t i = 0; i < block.of_sealed.output.size(); ++i) {
      const auto x = static_cast<double>(block.of_sealed.output[i] + block.of_recent.output[i]);
      energy_ += x * x;
    }
  }
  const auto dim = static_cast<ptrdiff_t>(layer_.head_dim), of_head = (n_ - half) * dim;
  gradient_.resize(static_cast<size_t>(of_head * layer_.q_heads));
  parallel_for(threads, static_cast<size_t>(layer_.q_heads), [&](size_t h) {
    const auto head = static_cast<ptrdiff_t>(h);
    for (int64_t t = half; t < n_; ++t)
      std::copy_n(rows_.output_gradient.data() + (t * layer_.q_heads + head) * dim, dim,
                  gradient_.data() + head * of_head + (t - half) * dim);
  });
}

// Neighbouring queries together, which see about the same keys.
std::vector<LayerErrors::Block> LayerErrors::blocks() const {
  const int dim = layer_.head_dim, group = layer_.q_heads / layer_.kv_heads;
  std::vector<Block> blocks;
  for (int head = 0; head < layer_.kv_heads; ++head) {
    for (size_t i = 0, all = sampled_.size() * static_cast<size_t>(group); i < all; i += kLanes) {
      Block& block = blocks.emplace_back();
      block.kv_head = head;
      block.lanes = static_cast<int>(std::min<size_t>(kLanes, all - i));
      block.rows = (block.lanes + kRowStep - 1) / kRowStep * kRowStep;
      block.columns = (block.lanes + kColumnStep - 1) / kColumnStep * kColumnStep;
      for (size_t j = 0; j < static_cast<size_t>(block.lanes); ++j) {
        const size_t query = i + j;
        block.sample[j] = query / static_cast<size_t>(group);
        block.head[j] = static_cast<size_t>(head * group) + query % static_cast<size_t>(group);
        const int64_t t = sampled_[block.sample[j]], pages = fixed_seal_target(layer_, t);
        block.first[j] = layer_.sliding_window > 0 ? std::max<int64_t>(0, t - layer_.sliding_window + 1) : 0;
        block.end[j] = t + 1;
        // Sinks are the same in both.
        block.sealed[j] = std::max(block.first[j], pages == 0 ? 0 : layer_.sinks + pages * kPageTokens);
        const float* q = head_of(rows_.queries, static_cast<int>(block.head[j])) + t * dim;
        for (int c = 0; c < dim; ++c) block.queries.push_back(q[c] * layer_.scale);
      }
      block.queries.resize(static_cast<size_t>(block.columns * dim));
      // Later queries see later keys.
      const auto last = static_cast<size_t>(block.lanes - 1);
      block.of_sealed.keys = {block.first[0], block.sealed[last]};
      block.of_recent.keys = {block.sealed[0], block.end[last]};
    }
  }
  return blocks;
}

void LayerErrors::score(const Block& block, const float* keys, const Span& span, const float* queries, int width,
                        std::vector<float>& room, std::vector<float>& scores) const {
  room.resize(static_cast<size_t>(span.size() * block.columns));
  scores.resize(room.size());
  ops_.multiply(keys + span.begin * width, span.size(), width, queries, block.columns, room.data());
  transpose(room.data(), span.size(), block.columns, scores.data());
}

void LayerErrors::weigh(const Block& block, const float* sealed, const float* recent, std::vector<float>& weights) const {
  const Span of_sealed = block.of_sealed.keys, of_recent = block.of_recent.keys;
  const int64_t begin = of_sealed.begin, keys = of_recent.end - begin;
  weights.resize(static_cast<size_t>(keys * block.rows));
  for (size_t lane = 0; lane < static_cast<size_t>(block.lanes); ++lane) {
    const auto row = static_cast<int64_t>(lane);
    const int64_t first = block.first[lane], middle = block.sealed[lane], end = block.end[lane];
    float* to = weights.data() + row * keys - begin;
    std::copy_n(sealed + row * of_sealed.size() + first - of_sealed.begin, middle - first, to + first);
    std::copy_n(recent + row * of_recent.size() + middle - of_recent.begin, end - middle, to + middle);
    ops_.weigh(to + first, static_cast<size_t>(end - first), 1.0f, 0.0f);
    std::fill(to + begin, to + first, 0.0f);
    std::fill(to + end, to + begin + keys, 0.0f);
  }
}

// With nothing quantised.
void LayerErrors::attend(Block& block) const {
  const int dim = layer_.head_dim;
  const float *keys = head_of(rows_.keys, block.kv_head), *values = head_of(rows_.values, block.kv_head);
  std::vector<float> queries(block.queries.size()), room, weights;
  transpose(block.queries.data(), block.columns, dim, queries.data());
  for (Part* part : {&block.of_sealed, &block.of_recent})
    score(block, keys, part->keys, queries.data(), dim, room, part->scores);
  weigh(block, block.of_sealed.scores.data(), block.of_recent.scores.data(), weights);
  const int64_t begin = block.of_sealed.keys.begin, all = block.of_recent.keys.end - begin;
  for (Part* part : {&block.of_sealed, &block.of_recent}) {
    const bool sealed = part == &block.of_sealed;
    const int64_t size = part->keys.size();
    part->weights.assign(static_cast<size_t>(size * block.rows), 0.0f);
    for (size_t lane = 0; lane < static_cast<size_t>(block.lanes); ++lane) {
      const int64_t from = sealed ? block.first[lane] : block.sealed[lane], to = sealed ? block.sealed[lane] : block.end[lane];
      const float* row = weights.data() + static_cast<ptrdiff_t>(lane) * all - begin;
      std::copy(row + from, row + to, part->weights.begin() + static_cast<ptrdiff_t>(lane) * size + from - part->keys.begin);
      part->mass[lane] = std::accumulate(row + from, row + to, 0.0f);
    }
    part->output.resize(static_cast<size_t>(block.rows * dim));
    ops_.multiply(part->weights.data(), block.rows, part->keys.size(), values + part->keys.begin * dim, dim,
                  part->output.data());
  }
}

std::vector<CodecErrors> LayerErrors::errors(std::span<const StoredSide> all) const {
  const auto heads = static_cast<size_t>(layer_.kv_heads), pairs = sampled_.size() * static_cast<size_t>(kNeighbours);
  // So many that mapping rows once for them is worth it, as long as there are enough tasks to fill threads evenly.
  constexpr size_t kMostTogether = 8, kTasksOfThread = 16;
  const size_t together =
      std::clamp<size_t>(all.size() * heads / (kTasksOfThread * static_cast<size_t>(threads_)), 1, kMostTogether);
  // Trellises first, which take longest, so that no thread is left alone with them.
  std::vector<size_t> order(all.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_partition(order, [&](size_t i) { return is_trellis(all[i].codec); });
  std::vector<std::vector<size_t>> groups;
  for (const size_t i : order) {
    const auto fits = [&](const std::vector<size_t>& group) {
      const StoredSide& one = all[group.front()];
      return one.transform == all[i].transform && one.side == all[i].side && group.size() < together;
    };
    const auto at = std::ranges::find_if(groups, fits);
    (at == groups.end() ? groups.emplace_back() : *at).push_back(i);
  }
  std::map<std::pair<const TransformSpec*, Side>, RowMapChain> maps;
  std::vector<Task> tasks;
  for (const std::vector<size_t>& group : groups) {
    const auto& [side, transform, codec, recent] = all[group.front()];
    const auto made =
        maps.try_emplace({transform, side}, *transform, row_shape(layer_, side), side == Side::kKey ? "keys" : "values");
    for (int h = 0; h < layer_.kv_heads; ++h) tasks.push_back({&made.first->second, h, group});
  }
  std::vector<HeadErrors> by_head(all.size() * heads);
  parallel_for(threads_, tasks.size(), [&](size_t i) { measure(tasks[i], all, by_head); });
  std::vector<CodecErrors> errors(all.size());
  parallel_for(threads_, all.size(), [&](size_t i) {
    std::vector<double> losses(pairs);
    for (size_t h = i * heads; h < (i + 1) * heads; ++h) {
      errors[i].output += by_head[h].squares / energy_;
      for (size_t k = 0; k < pairs; ++k) losses[k] += static_cast<double>(by_head[h].losses[k]);
    }
    for (size_t s = 0; s < sampled_.size(); ++s) {
      const int64_t begin = std::max(n_ / 2, sampled_[s] - kNear), end = std::min(n_, sampled_[s] + kNear + 1);
      const double* of = losses.data() + s * static_cast<size_t>(kNeighbours);
      errors[i].fisher += std::inner_product(of, of + (end - begin), of, 0.0) / static_cast<double>(end - begin) /
                          (2 * static_cast<double>(sampled_.size()));
    }
  });
  return errors;
}

void LayerErrors::measure(const Task& task, std::span<const StoredSide> all, std::span<HeadErrors> errors) const {
  const RowMapChain& maps = *task.maps;
  const Side side = all[task.which.front()].side;
  const bool key = side == Side::kKey;
  const int dim = layer_.head_dim, width = maps.width();
  const int64_t sinks = std::min<int64_t>(layer_.sinks, n_);
  const size_t per_head = blocks_.size() / static_cast<size_t>(layer_.kv_heads);
  const std::span<const Block> blocks(blocks_.data() + static_cast<size_t>(task.head) * per_head, per_head);

  std::vector<float> row(static_cast<size_t>(maps.room())), mapped(static_cast<size_t>(n_ * width));
  for (int64_t t = 0; t < n_; ++t) {
    std::copy_n(head_of(key ? rows_.keys : rows_.values, task.head) + t * dim, dim, row.begin());
    maps.store(task.head, row.data());
    std::copy_n(row.begin(), width, mapped.begin() + t * width);
  }
  std::vector<uint16_t> half(mapped.size());
  to_f16(mapped.data(), static_cast<int>(n_ * width), half.data());
  // Queries of each block as they meet stored keys, [width][columns], and what scores lose by that.
  std::vector<std::vector<float>> queries(key ? per_head : 0), lost(queries.size());
  std::vector<float> zero(row.size());
  maps.output(task.head, zero.data());
  for (size_t b = 0; b < queries.size(); ++b) {
    const Block& block = blocks[b];
    std::vector<float> met(static_cast<size_t>(block.columns * width));
    lost[b].resize(static_cast<size_t>(block.lanes));
    ops_.dots(zero.data(), block.queries.data(), block.lanes, dim, lost[b].data());
    for (int j = 0; j < block.lanes; ++j) {
      std::copy_n(block.queries.data() + j * dim, dim, row.begin());
      maps.query(task.head, row.data());
      std::copy_n(row.begin(), width, met.begin() + j * width);
    }
    queries[b].resize(met.size());
    transpose(met.data(), block.columns, width, queries[b].data());
  }

  std::vector<float> stored(mapped.size()), room, scores, weights, sums(static_cast<size_t>(kLanes * width)),
      changed(static_cast<size_t>(kLanes * dim));
  std::copy_n(mapped.begin(), sinks * width, stored.begin());
  for (const size_t i : task.which) {
    const CodecSpec& codec = all[i].codec;
    const bool recent = all[i].recent;
    if (recent) {
      const int64_t from = std::max(sinks, blocks.front().of_recent.keys.begin);
      std::copy(mapped.begin() + from * width, mapped.end(), stored.begin() + from * width);
      // As the cache does: keys are what queries meet one by one, so theirs alone are fed back.
      RecentRows(codec, width, key ? maps.feedback(task.head) : nullptr).read(n_ - from, stored.data() + from * width);
    } else {
      SealedPage page(codec, width, side);
      for (int64_t first = sinks; first + kPageTokens <= blocks.back().of_sealed.keys.end; first += kPageTokens)
        page.read(half.data() + first * width, maps.feedback(task.head), stored.data() + first * width);
    }
    HeadErrors& of_head = errors[i * static_cast<size_t>(layer_.kv_heads) + static_cast<size_t>(task.head)];
    of_head.losses.resize(sampled_.size() * static_cast<size_t>(kNeighbours));
    for (size_t b = 0; b < per_head; ++b) {
      const Block& block = blocks[b];
      const Part &part = recent ? block.of_recent : block.of_sealed, &other = recent ? block.of_sealed : block.of_recent;
      if (key) {
        score(block, stored.data(), part.keys, queries[b].data(), width, room, scores);
        float* of_lane = scores.data();
        for (const float back : lost[b]) {
          for (int u = 0; u < part.keys.size(); ++u) *of_lane++ += back;
        }
        weigh(block, recent ? other.scores.data() : scores.data(), recent ? scores.data() : other.scores.data(), weights);
        const int64_t begin = block.of_sealed.keys.begin;
        ops_.multiply(weights.data(), block.rows, static_cast<int>(block.of_recent.keys.end - begin),
                      head_of(rows_.values, task.head) + begin * dim, dim, changed.data());
        for (size_t k = 0; k < part.output.size(); ++k) changed[k] -= part.output[k] + other.output[k];
      } else {
        ops_.multiply(part.weights.data(), block.rows, part.keys.size(), stored.data() + part.keys.begin * width, width,
                      sums.data());
        // It is means that maps take back, so the mass is taken off and put on again.
        for (size_t j = 0; j < static_cast<size_t>(block.lanes); ++j) {
          const float mass = part.mass[j], by = mass > kLeastMass ? 1 / mass : 0.0f;
          const size_t from = j * static_cast<size_t>(width), to = j * static_cast<size_t>(dim);
          for (size_t c = 0; c < static_cast<size_t>(width); ++c) row[c] = sums[from + c] * by;
          maps.output(task.head, row.data());
          for (size_t c = 0; c < static_cast<size_t>(dim); ++c) changed[to + c] = row[c] * mass - part.output[to + c];
        }
      }
      add_errors(block, changed.data(), of_head);
    }
  }
}

// changed: the error of a block's outputs, [lanes][head_dim].
void LayerErrors::add_errors(const Block& block, const float* changed, HeadErrors& errors) const {
  const int dim = layer_.head_dim;
  const int64_t half = n_ / 2;
  for (size_t j = 0; j < static_cast<size_t>(block.lanes); ++j) {
    const float* error = changed + static_cast<ptrdiff_t>(j) * dim;
    for (int c = 0; c < dim; ++c) errors.squares += static_cast<double>(error[c]) * static_cast<double>(error[c]);
    const int64_t t = sampled_[block.sample[j]], begin = std::max(half, t - kNear), end = std::min(n_, t + kNear + 1);
    float losses[kNeighbours];
    ops_.dots(error, gradient_.data() + (static_cast<ptrdiff_t>(block.head[j]) * (n_ - half) + begin - half) * dim,
              static_cast<int>(end - begin), dim, losses);
    float* to = errors.losses.data() + block.sample[j] * static_cast<size_t>(kNeighbours);
    for (int64_t k = 0; k < end - begin; ++k) to[k] += losses[k];
  }
}

}  // namespace kvmix
