// A step's work: what is sealed, where rows go, and how attention is split over threads.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "cache/state.h"
#include "codec/encoders.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

// Up to this many new tokens a sequence's queries are split over page ranges; beyond, over blocks of queries.
constexpr int kDecodeTokens = 8;
constexpr int kQueryBlockTokens = 32;
constexpr int64_t kLeastPagesPerUnit = 4;
constexpr int kAppendBlockTokens = 32;

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

TileFormat sink_rows(int head_dim) {
  TileFormat rows;
  rows.width = head_dim;
  return rows;
}

// A partial softmax (AttendJob).
struct Partial {
  float *m, *l, *acc;
};

// Adds the partial softmax of other pages.
void merge(const Partial& other, int rows, int dim, const Partial& to) {
  for (int r = 0; r < rows; ++r) {
    const float top = std::max(to.m[r], other.m[r]);
    if (other.m[r] == -INFINITY) continue;
    const float mine = to.m[r] == -INFINITY ? 0.0f : std::exp(to.m[r] - top), theirs = std::exp(other.m[r] - top);
    to.m[r] = top;
    to.l[r] = mine * to.l[r] + theirs * other.l[r];
    float* acc = to.acc + static_cast<ptrdiff_t>(r) * dim;
    const float* from = other.acc + static_cast<ptrdiff_t>(r) * dim;
    for (int i = 0; i < dim; ++i) acc[i] = mine * acc[i] + theirs * from[i];
  }
}

template <typename T>
T* grown(std::vector<T>& v, size_t n) {
  if (v.size() < n) v.resize(n);
  return v.data();
}

}  // namespace

std::byte* Cache::Impl::change_slot(HeadState& head, int64_t page, size_t old_bytes, size_t fresh_bytes) {
  SlotChange change{&head, page, nullptr, old_bytes, pool.allocate(fresh_bytes), fresh_bytes};
  change.old = change.slot();
  change.slot() = change.fresh;
  changes.push_back(change);
  return change.fresh;
}

void Cache::Impl::plan_layer(size_t l) {
  const LayerConfig& layer = config.layers[l];
  const LayerSizes& s = sizes[l];
  LayerStep& step = steps[l];
  for (StepEntry& entry : entries) {
    LayerState& state = entry.sequence->layers[l];
    if (s.seals) {
      const int64_t target = seal_target(layer, state, entry.start);
      old_sealed.emplace_back(&state.sealed, state.sealed);
      // Head by head, so that a head's pages come out next to each other.
      for (int h = 0; h < layer.kv_heads; ++h) {
        HeadState& head = state.heads[static_cast<size_t>(h)];
        for (int64_t p = state.sealed; p < target; ++p) {
          const std::byte* open = head.pages[static_cast<size_t>(p)];
          step.seals.push_back({open, change_slot(head, p, s.open_bytes, s.packed_bytes), h});
        }
      }
      state.sealed = target;
    }
    const int64_t end = entry.start + entry.n_tokens;
    const int64_t pages = page_count(layer, end);
    for (HeadState& head : state.heads) {
      if (layer.sinks > 0 && entry.start < layer.sinks) {
        if (head.sinks == nullptr) {
          change_slot(head, -1, s.sink_bytes, s.sink_bytes);
        } else if (pool.shared(head.sinks)) {
          const std::byte* old = head.sinks;
          std::memcpy(change_slot(head, -1, s.sink_bytes, s.sink_bytes), old, s.sink_bytes);
        }
      }
      const size_t entries_needed = (static_cast<size_t>(pages) + kTableStep - 1) / kTableStep * kTableStep;
      if (head.pages.capacity() < entries_needed) head.pages.reserve(entries_needed);
      // A partly filled page that a fork shares is copied before it is written to.
      const auto last = static_cast<int64_t>(head.pages.size()) - 1;
      if (last >= 0 && live_slots(layer, last, entry.start) < kPageTokens && pool.shared(head.pages.back())) {
        const std::byte* old = head.pages.back();
        std::memcpy(change_slot(head, last, s.open_bytes, s.open_bytes), old, s.open_bytes);
      }
      for (int64_t p = last + 1; p < pages; ++p) {
        head.pages.push_back(nullptr);
        change_slot(head, p, s.open_bytes, s.open_bytes);
      }
    }
  }
  plan_attention(l);
}

void Cache::Impl::plan_attention(size_t l) {
  const LayerConfig& layer = config.layers[l];
  LayerStep& step = steps[l];
  step.units.clear();
  step.merges = 0;
  step.part_rows = 0;
  const int group = sizes[l].group;

  int64_t decode_pages = 0;
  for (const StepEntry& entry : entries) {
    if (entry.n_tokens > kDecodeTokens) continue;
    const int64_t pages = page_count(layer, entry.start + entry.n_tokens) - entry.sequence->layers[l].freed;
    decode_pages += pages * layer.kv_heads;
  }
  const int64_t share = std::max(kLeastPagesPerUnit, (decode_pages + config.threads * 3 - 1) / (config.threads * 3));
  int64_t most_pages = 0;
  int most_rows = 0;
  for (size_t e = 0; e < entries.size(); ++e) {
    const StepEntry& entry = entries[e];
    const int64_t begin = entry.sequence->layers[l].freed, end = page_count(layer, entry.start + entry.n_tokens);
    const int64_t pages = end - begin;
    most_pages = std::max(most_pages, pages);
    for (int head = 0; head < layer.kv_heads; ++head) {
      if (entry.n_tokens <= kDecodeTokens) {
        const int rows = entry.n_tokens * group;
        most_rows = std::max(most_rows, rows);
        const auto parts = static_cast<int>(config.threads == 1 ? 1 : std::max<int64_t>(1, (pages + share - 1) / share));
        for (int part = 0; part < parts; ++part) {
          step.units.push_back({static_cast<int>(e), head, 0, entry.n_tokens, part, parts, begin + pages * part / parts,
                                begin + pages * (part + 1) / parts, step.merges, step.part_rows});
        }
        if (parts > 1) step.part_rows += parts * rows;
        ++step.merges;
        continue;
      }
      for (int t = 0; t < entry.n_tokens; t += kQueryBlockTokens) {
        const int tokens = std::min(kQueryBlockTokens, entry.n_tokens - t);
        most_rows = std::max(most_rows, tokens * group);
        // Pages behind the block's last query are not visible to it.
        const int64_t block_end = std::max(begin, page_count(layer, entry.start + t + tokens));
        step.units.push_back({static_cast<int>(e), head, t, tokens, 0, 1, begin, block_end, step.merges, 0});
        ++step.merges;
      }
    }
  }

  // Everything that append and attend write to is there before they run.
  const auto rows = static_cast<size_t>(most_rows), dim = static_cast<size_t>(layer.head_dim);
  grown(part_m, static_cast<size_t>(step.part_rows));
  grown(part_l, static_cast<size_t>(step.part_rows));
  grown(part_acc, static_cast<size_t>(step.part_rows) * dim);
  size_t kernel_bytes = 0;
  for (const AttentionKernel* kernel : kernels)
    kernel_bytes = std::max(kernel_bytes, kernel->scratch_bytes(layer.head_dim, most_rows));
  for (ThreadScratch& t : threads) {
    grown(t.kernel, kernel_bytes + 64);
    grown(t.q, rows * dim);
    for (PartialRoom* room : {&t.whole, &t.open}) {
      if (room == &t.open && !sizes[l].recent_codes) continue;
      grown(room->m, rows);
      grown(room->l, rows);
      grown(room->acc, std::max(rows, size_t{1}) * dim);
    }
    if (sizes[l].recent_codes && !step.seals.empty()) grown(t.rows, kPageTokens * dim);
    grown(t.positions, rows);
    for (std::vector<PageRef>* pages : {&t.pages, &t.open_pages}) {
      if (pages->capacity() < static_cast<size_t>(most_pages) + 1) pages->reserve(static_cast<size_t>(most_pages) + kTableStep);
    }
  }
}

void Cache::append(int layer_index, const float* k, int64_t k_stride, const float* v, int64_t v_stride, int ith, int nth) {
  Impl& impl = *impl_;
  const auto l = static_cast<size_t>(layer_index);
  const LayerConfig& layer = impl.config.layers[l];
  const LayerSizes& s = impl.sizes[l];
  ThreadScratch& scratch = impl.threads[static_cast<size_t>(ith)];
  const auto dim = static_cast<size_t>(layer.head_dim);
  const auto start = Clock::now();

  const std::vector<SealJob>& seals = impl.steps[l].seals;
  for (size_t i = static_cast<size_t>(ith); i < seals.size(); i += static_cast<size_t>(nth)) {
    const SealJob& job = seals[i];
    const auto seal = [&](const TileFormat& open, const TileFormat& packed, const RowMapChain& maps, const std::byte* from,
                          std::byte* to) {
      const auto* rows = reinterpret_cast<const uint16_t*>(from);
      if (!open.spec.is_f16()) {
        for (int t = 0; t < kPageTokens; ++t) {
          std::byte record[kMostRowBytes];
          float row[256];
          load_row(open.spec, open.side, layer.head_dim, from, t, record);
          decode_row(open.spec, layer.head_dim, record, row);
          to_f16(row, layer.head_dim, scratch.rows.data() + static_cast<ptrdiff_t>(t) * layer.head_dim);
        }
        rows = scratch.rows.data();
      }
      codec_of(packed.spec).encode(packed.spec, packed.shape(), rows, maps.feedback(job.kv_head), to);
    };
    seal(s.open_key, s.key, impl.key_rows[l], job.open, job.packed);
    seal(s.open_value, s.value, impl.value_rows[l], job.open + s.open_key.bytes, job.packed + s.key.bytes);
  }
  const auto sealed = Clock::now();
  if (!seals.empty()) scratch.seal_seconds += std::chrono::duration<double>(sealed - start).count();

  // Threads share heads, and a prompt's blocks of tokens.
  alignas(64) float rows[kRowsTogether * 256];
  int task = 0;
  for (const StepEntry& entry : impl.entries) {
    for (int head = 0; head < layer.kv_heads; ++head) {
      HeadState& state = entry.sequence->layers[l].heads[static_cast<size_t>(head)];
      const float* columns = impl.recent_columns(l, head);
      for (int block = 0; block < entry.n_tokens; block += kAppendBlockTokens, ++task) {
        if (task % nth != ith) continue;
        const int end = std::min(entry.n_tokens, block + kAppendBlockTokens);
        for (int t = block, n = 0; t < end; t += n) {
          const int64_t position = entry.start + t;
          const bool sink = position < layer.sinks;
          const int64_t offset = sink ? position : position - layer.sinks;
          const auto slot = static_cast<int>(sink ? offset : offset % kPageTokens);
          n = std::min({kRowsTogether, end - t, (sink ? layer.sinks : kPageTokens) - slot});
          std::byte* page = sink ? state.sinks : state.pages[static_cast<size_t>(offset / kPageTokens)];
          const auto store = [&](const float* from, int64_t stride, const RowMapChain& maps, const TileFormat& format,
                                 const float* weights, std::byte* to) {
            for (int r = 0; r < n; ++r) {
              float* row = rows + r * layer.head_dim;
              std::copy_n(from + (entry.row + t + r) * stride + head * layer.head_dim, dim, row);
              maps.store(head, row);
            }
            store_open_rows(format, slot, n, rows, weights, to);
          };
          const TileFormat fp16 = sink_rows(layer.head_dim);
          store(k, k_stride, impl.key_rows[l], sink ? fp16 : s.open_key, columns, page);
          page += sink ? static_cast<size_t>(layer.sinks) * dim * 2 : s.open_key.bytes;
          store(v, v_stride, impl.value_rows[l], sink ? fp16 : s.open_value, nullptr, page);
        }
      }
    }
  }
  scratch.append_seconds += seconds_since(sealed);
}

void Cache::attend(int layer_index, const float* q, int64_t q_stride, float* out, int64_t out_stride, int ith, int nth) {
  (void)nth;  // units are taken as threads come free
  Impl& impl = *impl_;
  const auto l = static_cast<size_t>(layer_index);
  const LayerConfig& layer = impl.config.layers[l];
  const LayerSizes& s = impl.sizes[l];
  const LayerStep& step = impl.steps[l];
  ThreadScratch& scratch = impl.threads[static_cast<size_t>(ith)];
  const int dim = layer.head_dim, group = s.group;
  const auto start = Clock::now();

  auto* kernel_scratch = scratch.kernel.data();
  kernel_scratch += (64 - reinterpret_cast<uintptr_t>(kernel_scratch) % 64) % 64;

  AttendJob job{};
  job.scale = layer.scale;
  job.softcap = layer.softcap;
  job.sliding_window = layer.sliding_window;
  job.exact = impl.config.exact;

  const auto write_out = [&](const StepEntry& entry, int head, int first_token, int row, const float* acc, float l_sum) {
    float* to = out + (entry.row + first_token + row / group) * out_stride + (head * group + row % group) * dim;
    const float norm = l_sum > 0 ? 1.0f / l_sum : 0.0f;
    for (int i = 0; i < dim; ++i) to[i] = acc[i] * norm;
    impl.value_rows[l].output(head, to);
  };

  for (;;) {
    const int index = impl.next_unit[l].fetch_add(1, std::memory_order_relaxed);
    if (index >= static_cast<int>(step.units.size())) break;
    const AttendUnit& unit = step.units[static_cast<size_t>(index)];
    const StepEntry& entry = impl.entries[static_cast<size_t>(unit.entry)];
    const LayerState& state = entry.sequence->layers[l];
    const HeadState& head = state.heads[static_cast<size_t>(unit.head)];
    const int rows = unit.tokens * group;
    const int64_t length = entry.start + entry.n_tokens;

    for (int r = 0; r < rows; ++r) {
      const int token = unit.first_token + r / group;
      float* to = scratch.q.data() + static_cast<ptrdiff_t>(r) * dim;
      std::copy_n(q + (entry.row + token) * q_stride + (unit.head * group + r % group) * dim, dim, to);
      impl.key_rows[l].query(unit.head, to);
      scratch.positions[static_cast<size_t>(r)] = entry.start + token;
    }
    const int64_t oldest = layer.sliding_window > 0 ? entry.start + unit.first_token - layer.sliding_window + 1 : 0;
    scratch.pages.clear();
    scratch.open_pages.clear();
    if (unit.part == 0 && layer.sinks > 0 && oldest < layer.sinks) {
      scratch.pages.push_back({head.sinks, head.sinks + static_cast<size_t>(layer.sinks) * static_cast<size_t>(dim) * 2, 0,
                               static_cast<int>(std::min<int64_t>(layer.sinks, length)), false});
    }
    for (int64_t p = unit.page_begin; p < unit.page_end; ++p) {
      const int64_t first = layer.sinks + p * kPageTokens;
      if (first + kPageTokens <= oldest) continue;
      const std::byte* page = head.pages[static_cast<size_t>(p)];
      const bool packed = p < state.sealed, codes = packed || s.recent_codes;
      (packed || !codes ? scratch.pages : scratch.open_pages)
          .push_back({page, page + (packed ? s.key.bytes : s.open_key.bytes), first, live_slots(layer, p, length), codes});
    }
    job.rows = rows;
    job.q = scratch.q.data();
    job.position = scratch.positions.data();
    const bool whole = unit.parts == 1;
    const int slot = unit.part_slot + unit.part * rows;
    const Partial partial = whole ? Partial{scratch.whole.m.data(), scratch.whole.l.data(), scratch.whole.acc.data()}
                                  : Partial{impl.part_m.data() + slot, impl.part_l.data() + slot,
                                            impl.part_acc.data() + static_cast<ptrdiff_t>(slot) * dim};
    const auto attend_to = [&](const TileFormat& key, const TileFormat& value, std::span<const PageRef> pages,
                               const Partial& to) {
      job.key = key;
      job.value = value;
      job.pages = pages;
      job.m = to.m;
      job.l = to.l;
      job.acc = to.acc;
      impl.pick_kernel(job).attend(job, kernel_scratch);
    };
    // Rows of codes have formats of their own, so a launch of their own.
    const bool apart = !scratch.open_pages.empty(), both = apart && !scratch.pages.empty();
    if (!apart || both) attend_to(s.key, s.value, scratch.pages, partial);
    if (apart) {
      const Partial open = both ? Partial{scratch.open.m.data(), scratch.open.l.data(), scratch.open.acc.data()} : partial;
      attend_to(s.open_key, s.open_value, scratch.open_pages, open);
      if (both) merge(open, rows, dim, partial);
    }
    if (whole) {
      for (int r = 0; r < rows; ++r) {
        write_out(entry, unit.head, unit.first_token, r, partial.acc + static_cast<ptrdiff_t>(r) * dim, partial.l[r]);
      }
      continue;
    }
    // The last part to finish merges all of them, in order; it also readies the counter for the next layer.
    std::atomic<int>& remaining = impl.remaining[static_cast<size_t>(unit.merge)];
    if (remaining.fetch_add(1, std::memory_order_acq_rel) != unit.parts - 1) continue;
    remaining.store(0, std::memory_order_relaxed);
    for (int r = 0; r < rows; ++r) {
      const auto at = [&](int part) {
        return static_cast<ptrdiff_t>(unit.part_slot) + static_cast<ptrdiff_t>(part) * rows + r;
      };
      float top = -INFINITY;
      for (int part = 0; part < unit.parts; ++part) top = std::max(top, impl.part_m[static_cast<size_t>(at(part))]);
      float* acc = scratch.whole.acc.data();
      std::fill_n(acc, dim, 0.0f);
      float sum = 0;
      for (int part = 0; part < unit.parts; ++part) {
        const float m = impl.part_m[static_cast<size_t>(at(part))];
        if (m == -INFINITY) continue;
        const float weight = std::exp(m - top);
        sum += weight * impl.part_l[static_cast<size_t>(at(part))];
        const float* from = impl.part_acc.data() + at(part) * dim;
        for (int i = 0; i < dim; ++i) acc[i] += weight * from[i];
      }
      write_out(entry, unit.head, unit.first_token, r, acc, sum);
    }
  }
  scratch.attend_seconds += seconds_since(start);
}

}  // namespace kvmix
