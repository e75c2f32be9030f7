// What token policies want of the device: the last queries of prompts and what they look at, and pages of the tokens that stay.
#include <algorithm>

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
  int window = 0;
  for (const Layer& layer : layers_) window = std::max(window, queries_kept(layer));
  int64_t before = 0;
  size_t scores = 0, sums = 0;
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
      if (queries_kept(layer) == 0) continue;
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
    const int64_t lists = static_cast<int64_t>(prompt.row) * config.kv_heads;
    score_window({.table = {reinterpret_cast<uint8_t*>(pool_.base()), tables_.device(layer.table_at) + lists * tables_.stride,
                            tables_.stride, config.sinks},
                  .open = layer.open,
                  .sealed = record_shape(layer.format),
                  .heads = input<WindowHead>(scored.heads_at),
                  .kv_heads = config.kv_heads,
                  .heads_per_kv = layer.heads_per_kv(),
                  .head_dim = config.head_dim,
                  .queries = to,
                  .window = keep.window,
                  .begin = prompt.begin,
                  .rows = static_cast<int>(prompt.end - prompt.begin),
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
  return {{host_sums_.data<float>() + head.first_sum, sums}, static_cast<int>(prompt.end - prompt.begin)};
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
  const LayerConfig& config = layer.config;
  const auto heads = static_cast<size_t>(config.kv_heads);
  std::vector<const Gather*> open;
  std::vector<std::vector<const Gather*>> sealed(heads);
  size_t most = 0;
  for (const Gather& job : jobs) {
    if (format(job.to()).appendable()) {
      open.push_back(&job);
      continue;
    }
    std::vector<const Gather*>& of_head = sealed[static_cast<size_t>(job.kv_head)];
    of_head.push_back(&job);
    most = std::max(most, of_head.size());
  }
  const size_t staged = 2 * static_cast<size_t>(kPageTokens) * static_cast<size_t>(config.head_dim) * sizeof(__half);
  const size_t together = std::max<size_t>(kMostStaged / (staged * heads), 1);  // pages of every head
  for (size_t first = 0; first == 0 || first < most; first += together) {
    const size_t pages = std::min(together, most - first);
    std::vector<RowTarget> targets;
    std::vector<RowSource> sources;
    std::vector<int32_t> open_ids(pages * heads, 0), record_ids(pages * heads, kNoRecord);
    bool feeds_back = false;
    staged_.reserve(pages * heads * staged, "rows on their way into sealed pages");
    const auto add = [&](const Gather& job, std::byte* page, int rows, int slots) {
      targets.push_back({.page = reinterpret_cast<uint8_t*>(page),
                         .first = static_cast<int64_t>(sources.size()),
                         .sources = static_cast<int32_t>(job.sources.size()),
                         .slots = slots,
                         .rows = rows,
                         .kv_head = job.kv_head});
      for (const Gather::Source& source : job.sources) {
        const PageFormat& f = format(source.page);
        const int32_t kind = is_rows(f) ? f.slots : f.appendable() ? RowSource::kOpenRecord : RowSource::kSealedRecord;
        sources.push_back({reinterpret_cast<const uint8_t*>(memory(source.page.handle)), source.slot, kind});
        feeds_back = feeds_back || (rows == 0 && kind != RowSource::kOpenRecord);
      }
    };
    for (const Gather* job : first == 0 ? std::span(open) : std::span<const Gather*>()) {
      const PageFormat& f = format(job->to());
      add(*job, memory(job->to().handle), is_rows(f) ? f.slots : 0, static_cast<int>(job->sources.size()));
    }
    for (size_t h = 0; h < heads; ++h) {
      for (size_t i = first; i < std::min(first + pages, sealed[h].size()); ++i) {
        const size_t at = (i - first) * heads + h;
        open_ids[at] = static_cast<int32_t>(at);
        record_ids[at] = id_of(sealed[h][i]->to().handle);
        add(*sealed[h][i], staged_.data() + at * staged, kPageTokens, kPageTokens);
      }
    }
    size_t bytes = 0;
    const auto place = [&](size_t size) { return std::exchange(bytes, bytes + (size + 255) / 256 * 256); };
    const size_t targets_at = place(targets.size() * sizeof(RowTarget)), sources_at = place(sources.size() * sizeof(RowSource)),
                 open_at = place(open_ids.size() * sizeof(int32_t)), record_at = place(record_ids.size() * sizeof(int32_t));
    std::byte* const to = moves_.begin(bytes);
    std::copy(targets.begin(), targets.end(), reinterpret_cast<RowTarget*>(to + targets_at));
    std::copy(sources.begin(), sources.end(), reinterpret_cast<RowSource*>(to + sources_at));
    std::copy(open_ids.begin(), open_ids.end(), reinterpret_cast<int32_t*>(to + open_at));
    std::copy(record_ids.begin(), record_ids.end(), reinterpret_cast<int32_t*>(to + record_at));
    moves_.upload(bytes, stream_.get());
    move_rows({.targets = on_device<RowTarget>(moves_, targets_at),
               .sources = on_device<RowSource>(moves_, sources_at),
               .count = static_cast<int>(targets.size()),
               .head_dim = config.head_dim,
               .open = layer.open,
               .sealed = record_shape(layer.format),
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
    const SealJob job = seal_job(layer, p, {config.head_dim, kF16Bits, kF16Bits, kPageTokens, kPageTokens});
    seal({&job, 1});
  }
}

}  // namespace kvmix::cuda
