// What policies want of the device: the last queries of prompts and what they look at, and pages of the tokens that stay.
#include <algorithm>

#include "backend/cuda/channels.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/gather.h"
#include "base/cuda/launch.h"
#include "codec/cuda/seal.h"
#include "kvmix/error.h"

namespace kvmix::cuda {
namespace {

constexpr size_t kMostScores = size_t{16} << 20;  // floats of window scores, if a KV head does not take more
constexpr size_t kMostStaged = size_t{64} << 20;  // bytes of rows on their way into sealed pages

template <class T>
const T* on_device(const StepInputs& inputs, size_t at) {
  return reinterpret_cast<const T*>(inputs.device() + at);
}

}  // namespace

size_t CudaBackend::query_bytes(const Layer& layer) const {
  return static_cast<size_t>(queries_kept(layer)) * static_cast<size_t>(layer.config.q_heads * layer.config.head_dim) *
         sizeof(__half);
}

// Which queries of the step's prompts are kept, and where those that end a prompt put what they see.
void CudaBackend::begin_prompts() {
  prompts_.clear();
  if (room_bytes_ == 0) return;
  const int window = most_kept_;
  int64_t before = 0;
  size_t scores = 0, sums = 0, squares = 0;
  for (size_t i = 0; i < order_.size(); ++i) {
    const StepEntry& entry = plan_->entries[order_[i]];
    const int64_t rows_before = before;
    before += entry.n_tokens;
    if (!entry.prompt) continue;
    const auto kept = prompt_queries_.find(entry.id);
    // Tokens of the prompt whose queries are not here any more were cut off by a truncation.
    const int64_t known = kept != prompt_queries_.end() ? kept->second.begin : entry.start;
    PromptQueries& queries = prompt_queries_[entry.id];
    if (kept == prompt_queries_.end()) queries.begin = queries.end = entry.start;
    DeviceMemory& room = queries.rooms[static_cast<size_t>(1 - queries.turn)];
    if (room.bytes() == 0 && !spare_rooms_.empty()) {
      room = std::move(spare_rooms_.back());
      spare_rooms_.pop_back();
    }
    room.reserve(room_bytes_, "the last queries of a prompt");
    PromptStep& step = prompts_[entry.id];
    step = {.row = i,
            .before = rows_before,
            .ends = entry.ends_prompt,
            .begin = std::max({entry.end() - window, entry.prompt_start, known}),
            .end = entry.end(),
            .layers = {}};
    if (!step.ends) continue;
    for (const Layer& layer : layers_) {
      PromptStep::Scored& scored = step.layers.emplace_back();
      if (layer.ids.thins)
        scored.squares_at = std::exchange(squares, squares + static_cast<size_t>(layer.config.q_heads * layer.config.head_dim));
      if (!layer.ids.governed || layer.ids.window_queries == 0) continue;
      const auto heads = static_cast<size_t>(layer.config.kv_heads);
      for (const int32_t length : std::span(shapes_[layer.shape].lengths).subspan(i * heads, heads)) {
        scored.heads.push_back({static_cast<int64_t>(sums), length});
        scored.most_tokens = std::max<int64_t>(scored.most_tokens, length);
        sums += static_cast<size_t>(length) * static_cast<size_t>(layer.heads_per_kv());
      }
      const size_t room_of_head = window_room(layer.heads_per_kv(), window, scored.most_tokens);
      const size_t together = std::clamp<size_t>(kMostScores / room_of_head, 1, heads);
      scores = std::max(scores, together * room_of_head);
    }
  }
  window_scores_.reserve(scores * sizeof(float), "scores of a prompt's last queries");
  window_sums_.reserve(sums * sizeof(float), "what a prompt's last queries look at");
  host_sums_.reserve(sums * sizeof(float), "pinned memory of what a prompt's last queries look at");
  query_squares_.reserve(squares * sizeof(float), "squares of a prompt's last queries");
  host_squares_.reserve(squares * sizeof(float), "pinned memory of squares of a prompt's last queries");
}

// Once the layer was attended to: its queries stand in scratch_->queries.
void CudaBackend::score_prompts(const Layer& layer, size_t l) {
  if (queries_kept(layer) == 0 || prompts_.empty()) return;
  const LayerConfig& config = layer.config;
  for (const auto& [id, prompt] : prompts_) {
    const PromptQueries& queries = prompt_queries_.at(id);
    const StepEntry& entry = plan_->entries[order_[prompt.row]];
    const auto room = [&](int turn) {
      return reinterpret_cast<__half*>(queries.rooms[static_cast<size_t>(turn)].data() + layer.queries_at);
    };
    __half* const to = room(1 - queries.turn);
    const KeepQueries keep{.halves = reinterpret_cast<const __half*>(scratch_->queries.data()),
                           .kept = queries.rooms[static_cast<size_t>(queries.turn)].bytes() == 0 ? nullptr : room(queries.turn),
                           .to = to,
                           .before = prompt.before,
                           .tokens = entry.n_tokens,
                           .kv_heads = config.kv_heads,
                           .heads_per_kv = layer.heads_per_kv(),
                           .head_dim = config.head_dim,
                           .window = queries_kept(layer),
                           .begin = prompt.begin,
                           .end = prompt.end,
                           .start = entry.start};
    keep_queries(keep, stream_.get());
    if (!prompt.ends) continue;
    const PromptStep::Scored& scored = prompt.layers[l];
    if (layer.ids.thins) {
      const auto rows = static_cast<int>(std::min<int64_t>(layer.ids.channel_queries, prompt.end - prompt.begin));
      const size_t n = static_cast<size_t>(config.q_heads * config.head_dim) * sizeof(float);
      std::byte* const means = query_squares_.data() + scored.squares_at * sizeof(float);
      square_queries({.queries = to,
                      .window = keep.window,
                      .q_heads = config.q_heads,
                      .head_dim = config.head_dim,
                      .begin = prompt.end - rows,
                      .rows = rows,
                      .means = reinterpret_cast<float*>(means)},
                     stream_.get());
      check_cuda(
          cudaMemcpyAsync(host_squares_.data<float>() + scored.squares_at, means, n, cudaMemcpyDeviceToHost, stream_.get()),
          "squares of a prompt's last queries: copy");
      scored_.record(stream_.get());
    }
    if (scored.heads.empty()) continue;
    const int64_t rows = std::min<int64_t>(layer.ids.window_queries, prompt.end - prompt.begin);
    const int64_t lists = static_cast<int64_t>(prompt.row) * config.kv_heads;
    score_window({.table = {reinterpret_cast<uint8_t*>(pool_.base()), tables_.device(layer.table_at) + lists * tables_.stride,
                            tables_.stride, config.sinks},
                  .open = layer.open,
                  .sealed = record_shape(layer.format),
                  .thin = layer.thin,
                  .channels = reinterpret_cast<const uint8_t*>(channels_.data()) + layer.channels_at +
                              prompt.row * layer.channel_bytes(),
                  .heads = input<WindowHead>(scored.heads_at),
                  .kv_heads = config.kv_heads,
                  .heads_per_kv = layer.heads_per_kv(),
                  .head_dim = config.head_dim,
                  .queries = to,
                  .window = keep.window,
                  .begin = prompt.end - rows,
                  .rows = static_cast<int>(rows),
                  .most_tokens = scored.most_tokens,
                  .scale = config.scale,
                  .softcap = config.softcap,
                  .room = reinterpret_cast<float*>(window_scores_.data()),
                  .room_floats = window_scores_.bytes() / sizeof(float),
                  .sums = reinterpret_cast<float*>(window_sums_.data())},
                 stream_.get());
    const WindowHead& last = scored.heads.back();
    const auto first = static_cast<size_t>(scored.heads.front().first_sum);
    const size_t sums = static_cast<size_t>(last.first_sum + last.tokens * layer.heads_per_kv()) - first;
    check_cuda(cudaMemcpyAsync(host_sums_.data<float>() + first, window_sums_.data() + first * sizeof(float),
                               sums * sizeof(float), cudaMemcpyDeviceToHost, stream_.get()),
               "what a prompt's last queries look at: copy");
    scored_.record(stream_.get());
  }
}

Backend::Window CudaBackend::window(SequenceId id, int layer, int kv_head) const {
  scored_.wait();
  const PromptStep& prompt = prompts_.at(id);
  const WindowHead& head = prompt.layers[static_cast<size_t>(layer)].heads[static_cast<size_t>(kv_head)];
  const auto sums = static_cast<size_t>(head.tokens) * static_cast<size_t>(layers_[static_cast<size_t>(layer)].heads_per_kv());
  const int64_t queries = std::min<int64_t>(layers_[static_cast<size_t>(layer)].ids.window_queries, prompt.end - prompt.begin);
  return {{host_sums_.data<float>() + head.first_sum, sums}, static_cast<int>(queries)};
}

void CudaBackend::end() {
  for (const auto& [id, prompt] : prompts_) {
    if (prompt.ends) {
      forget(id);
      continue;
    }
    PromptQueries& queries = prompt_queries_.at(id);
    queries.turn = 1 - queries.turn;
    queries.begin = prompt.begin, queries.end = prompt.end;
  }
  prompts_.clear();
}

void CudaBackend::forget(SequenceId id) {
  const auto kept = prompt_queries_.find(id);
  if (kept == prompt_queries_.end()) return;
  for (DeviceMemory& room : kept->second.rooms) {
    if (room.bytes() > 0) spare_rooms_.push_back(std::move(room));
  }
  prompt_queries_.erase(kept);
}

void CudaBackend::fork(SequenceId from, SequenceId to) {
  const auto kept = prompt_queries_.find(from);
  if (kept == prompt_queries_.end()) return;
  use_device();
  PromptQueries& copy = prompt_queries_[to];
  const auto turn = static_cast<size_t>(kept->second.turn);
  copy.turn = kept->second.turn, copy.begin = kept->second.begin, copy.end = kept->second.end;
  if (kept->second.rooms[turn].bytes() == 0) return;
  copy.rooms[turn].reserve(room_bytes_, "the last queries of a prompt");
  check_cuda(cudaMemcpyAsync(copy.rooms[turn].data(), kept->second.rooms[turn].data(), room_bytes_, cudaMemcpyDeviceToDevice,
                             stream_.get()),
             "the last queries of a prompt: copy");
}

void CudaBackend::cut_queries(SequenceId id, int64_t n) {
  const auto kept = prompt_queries_.find(id);
  if (kept == prompt_queries_.end()) return;
  kept->second.end = std::min(kept->second.end, n);
  kept->second.begin = std::min(kept->second.begin, n);
}

// Rows of open pages move by one launch; those of sealed ones stand as fp16 rows first and are sealed from there.
void CudaBackend::gather(std::span<const Gather> jobs) {
  if (jobs.empty()) return;
  use_device();
  join();
  const Layer& layer = layers_[static_cast<size_t>(jobs.front().layer)];
  const auto heads = static_cast<size_t>(layer.config.kv_heads);
  std::vector<const Gather*> open;
  std::vector<std::vector<const Gather*>> sealed(heads), thin(heads);
  for (const Gather& job : jobs) {
    if (format(job.to()).appendable()) {
      open.push_back(&job);
    } else {
      (is_thin(layer, job.to()) ? thin : sealed)[static_cast<size_t>(job.kv_head)].push_back(&job);
    }
  }
  gather(layer, open, sealed, false);
  if (layer.ids.thins) gather(layer, {}, thin, true);
}

// Open pages, and sealed ones of one format by KV head.
void CudaBackend::gather(const Layer& layer, std::span<const Gather* const> open,
                         std::span<const std::vector<const Gather*>> sealed, bool thin) {
  const LayerConfig& config = layer.config;
  const size_t heads = sealed.size(), dim = static_cast<size_t>(config.head_dim);
  const size_t width = thin ? static_cast<size_t>(layer.thin.key_width) : 0;
  size_t most = 0;
  for (const auto& of_head : sealed) most = std::max(most, of_head.size());
  if (most == 0 && open.empty()) return;
  const size_t staged = 2 * static_cast<size_t>(kPageTokens) * dim * sizeof(__half);
  size_t together = std::max<size_t>(kMostStaged / (staged * heads), 1);  // pages of every head
  if (thin) together = std::min(together, whole_together(layer));
  for (size_t first = 0; first == 0 || first < most; first += together) {
    const size_t pages = std::min(together, most - first), all = pages * heads;
    std::vector<RowTarget> targets;
    std::vector<RowSource> sources;
    // Of thin pages `record_ids` are places among records of all channels, `ids` the pages.
    std::vector<int32_t> open_ids(all, 0), record_ids(all, kNoRecord), ids(thin ? all : 0, kNoRecord);
    std::vector<uint8_t> chosen(all * width), columns(layer.ids.thins ? heads * dim : 0, RowTarget::kNoColumn);
    bool feeds_back = false;
    staged_.reserve(all * staged, "rows on their way into sealed pages");
    const auto add = [&](const Gather& job, std::byte* page, int rows, int slots) {
      targets.push_back({.page = reinterpret_cast<uint8_t*>(page),
                         .first = static_cast<int64_t>(sources.size()),
                         .sources = static_cast<int32_t>(job.sources.size()),
                         .slots = slots,
                         .rows = rows,
                         .kv_head = job.kv_head});
      for (const Gather::Source& source : job.sources) {
        const PageFormat& f = format(source.page);
        const int32_t kind = is_rows(f)                    ? f.slots
                             : f.appendable()              ? RowSource::kOpenRecord
                             : is_thin(layer, source.page) ? RowSource::kThinRecord
                                                           : RowSource::kSealedRecord;
        sources.push_back({reinterpret_cast<const uint8_t*>(memory(source.page.handle)), source.slot, kind});
        feeds_back = feeds_back || (rows == 0 && kind != RowSource::kOpenRecord);
      }
      if (!columns.empty()) write_columns(layer, *job.list, columns.data() + static_cast<size_t>(job.kv_head) * dim);
    };
    for (const Gather* job : first == 0 ? open : std::span<const Gather* const>()) {
      const PageFormat& f = format(job->to());
      add(*job, memory(job->to().handle), is_rows(f) ? f.slots : 0, static_cast<int>(job->sources.size()));
    }
    for (size_t h = 0; h < heads; ++h) {
      for (size_t i = first; i < std::min(first + pages, sealed[h].size()); ++i) {
        const size_t at = (i - first) * heads + h;
        open_ids[at] = static_cast<int32_t>(at);
        record_ids[at] = thin ? static_cast<int32_t>(at) : id_of(sealed[h][i]->to().handle);
        if (thin) {
          ids[at] = id_of(sealed[h][i]->to().handle);
          std::copy_n(sealed[h][i]->list->channels.begin(), width, chosen.data() + at * width);
        }
        add(*sealed[h][i], staged_.data() + at * staged, kPageTokens, kPageTokens);
      }
    }
    size_t bytes = 0;
    const auto place = [&](const auto& numbers) {
      return std::exchange(bytes, bytes + (numbers.size() * sizeof(numbers[0]) + 255) / 256 * 256);
    };
    const size_t targets_at = place(targets), sources_at = place(sources), open_at = place(open_ids),
                 record_at = place(record_ids), ids_at = place(ids), chosen_at = place(chosen), columns_at = place(columns);
    std::byte* const to = moves_.begin(bytes);
    for (RowTarget& target : targets) {
      if (!columns.empty()) target.columns = on_device<uint8_t>(moves_, columns_at) + static_cast<size_t>(target.kv_head) * dim;
    }
    const auto write = [&](const auto& numbers, size_t at) {
      std::copy(numbers.begin(), numbers.end(), reinterpret_cast<std::decay_t<decltype(numbers[0])>*>(to + at));
    };
    write(targets, targets_at), write(sources, sources_at), write(open_ids, open_at), write(record_ids, record_at);
    write(ids, ids_at), write(chosen, chosen_at), write(columns, columns_at);
    moves_.upload(bytes, stream_.get());
    move_rows({.targets = on_device<RowTarget>(moves_, targets_at),
               .sources = on_device<RowSource>(moves_, sources_at),
               .count = static_cast<int>(targets.size()),
               .head_dim = config.head_dim,
               .open = layer.open,
               .sealed = record_shape(layer.format),
               .thin = layer.thin,
               .key_panels = feeds_back ? layer.key_panels : nullptr},
              stream_.get());
    if (pages == 0) continue;
    kvmix_cuda_seal_params p{};
    p.format = layer.format;
    p.pages = static_cast<int32_t>(pages), p.kv_heads = config.kv_heads;
    p.open_pages = staged_.data(), p.records = pool_.base();
    p.open_page_stride = static_cast<int64_t>(staged), p.record_page_stride = kPageUnit;
    p.open_ids = on_device<int32_t>(moves_, open_at);
    p.record_ids = on_device<int32_t>(moves_, record_at);
    p.stream = stream_.get();
    const RecordShape rows{config.head_dim, kF16Bits, kF16Bits, kPageTokens, kPageTokens};
    if (thin) {
      seal_thin(layer, p, rows, on_device<int32_t>(moves_, ids_at), on_device<uint8_t>(moves_, chosen_at),
                whole_records_.back());
    } else {
      seal(std::array{seal_job(layer, p, rows)});
    }
  }
}

}  // namespace kvmix::cuda
