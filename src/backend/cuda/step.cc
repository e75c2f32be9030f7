// A step on the device: its tables and work lists by one copy, then a few launches a layer.
#include <algorithm>
#include <numeric>

#include "attention/cuda/shape.h"
#include "backend/cuda/cuda_backend.h"
#include "base/checksum.h"
#include "base/cuda/launch.h"
#include "codec/cuda/seal.h"
#include "kvmix/error.h"

namespace kvmix::cuda {
namespace {

constexpr size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

// Brings the tables up to what the step's sequences have, where a row is not what their step began with.
void CudaBackend::write_tables() {
  size_t heads = 0;
  int64_t ids = 0;
  for (const Layer& layer : layers_) heads += static_cast<size_t>(layer.config.kv_heads);
  for (const StepEntry& entry : plan_->entries) ids = std::max<int64_t>(ids, entry.end() / kPageTokens + 3);
  tables_.reserve(order_.size(), heads, ids);
  size_t at = 0;
  for (Layer& layer : layers_) {
    layer.table_at = at;
    const size_t lists = tables_.rows() * static_cast<size_t>(layer.config.kv_heads);
    at += lists * static_cast<size_t>(tables_.stride);
    if (layer.own_lists()) layer.dropped.resize(lists);
  }
  const auto stale = [&](size_t row) {
    const StepEntry& entry = plan_->entries[order_[row]];
    return tables_.revisions[row] != entry.pages->revision && tables_.revisions[row] != entry.revision;
  };
  bool waited = false;  // for the copies of the step before
  for (size_t first = 0; first < order_.size();) {
    if (!stale(first)) {
      ++first;
      continue;
    }
    if (!waited) tables_.wait();
    waited = true;
    size_t end = first;  // rows next to each other are copied together
    while (end < order_.size() && stale(end)) ++end;
    const auto width = [&](size_t l) {
      return static_cast<size_t>(layers_[l].config.kv_heads) * static_cast<size_t>(tables_.stride);
    };
    for (size_t l = 0, alike = 0; l < layers_.size(); ++l) {
      for (size_t row = first; row < end; ++row) {
        const StepEntry& entry = plan_->entries[order_[row]];
        write_table(layers_[l], l, entry, tables_.host(layers_[l].table_at + row * width(l)));
        if (layers_[l].ids.governed) read_dropped(layers_[l], l, row, entry);
      }
      ++alike;  // layers whose tables are of one size lie as far apart
      if (l + 1 < layers_.size() && width(l + 1) == width(l)) continue;
      tables_.copy(layers_[l + 1 - alike].table_at + first * width(l), (end - first) * width(l), alike,
                   tables_.rows() * width(l), stream_.get());
      alike = 0;
    }
    for (; first < end; ++first) tables_.revisions[first] = plan_->entries[order_[first]].pages->revision;
  }
}

// What the step changes in rows that are what it began with.
void CudaBackend::find_patches() {
  patches_.clear();
  patched_row_.assign(order_.size(), -1);
  for (size_t row = 0; row < order_.size(); ++row) {
    const StepEntry& entry = plan_->entries[order_[row]];
    if (tables_.revisions[row] != entry.pages->revision) patched_row_[order_[row]] = static_cast<int32_t>(row);
  }
  for (size_t i = 0; i < plan_->changes.size(); ++i) {
    fetch_ahead(plan_->changes, i);
    const PageChange& change = plan_->changes[i];
    const PageChange::Owner& owner = change.owner;
    const int64_t row = patched_row_[static_cast<size_t>(owner.entry)];
    if (row < 0) continue;
    const Layer& layer = layers_[static_cast<size_t>(owner.layer)];
    const PageEntry& page = change.entry();
    const int64_t list = row * layer.config.kv_heads + owner.kv_head;
    const int64_t place = layer.ids.governed ? static_cast<int64_t>(change.index) : table_place(layer, page);
    patches_.push_back({static_cast<int64_t>(layer.table_at) + list * tables_.stride + place, table_id(page)});
  }
}

void CudaBackend::write_table(const Layer& layer, size_t l, const StepEntry& entry, int32_t* table) const {
  for (const PageList& list : entry.pages->layers[l].heads) {
    int64_t at = 0;
    for (const PageEntry& page : list.pages) {
      // Pages that a sliding window left are not read.
      for (const int64_t place = layer.ids.governed ? at : table_place(layer, page); at < place;) table[at++] = 0;
      table[at++] = table_id(page);
    }
    table += tables_.stride;
  }
}

// Of lists whose pages are full but for the last; how many slots of that one are live need not be up to date.
void CudaBackend::read_dropped(Layer& layer, size_t l, size_t row, const StepEntry& entry) const {
  const auto heads = static_cast<size_t>(layer.config.kv_heads);
  for (size_t h = 0; h < heads; ++h) {
    const std::vector<PageEntry>& pages = entry.pages->layers[l].heads[h].pages;
    int64_t before = 0;  // tokens of the pages before the last
    for (size_t i = 0; i + 1 < pages.size(); ++i) {
      before += pages[i].live;
      if (pages[i].live < format(pages[i]).slots) throw Error(Status::kInternal, "a page within a list is not full");
    }
    layer.dropped[row * heads + h] = static_cast<int32_t>(pages.back().first - before);
  }
}

// Pages of every head that a layer seals, in its thin format or in the other one.
int CudaBackend::count_seals(const Layer& layer, size_t l, bool thin) {
  sealed_of_head_.assign(static_cast<size_t>(layer.config.kv_heads), 0);
  for (const Transcode& job : plan_->transcodes[l]) {
    if (is_thin(layer, job.to()) == thin) ++sealed_of_head_[static_cast<size_t>(job.kv_head)];
  }
  return *std::max_element(sealed_of_head_.begin(), sealed_of_head_.end());
}

// Any page of a head goes with any of another: [pages][kv_heads]. Heads of their own lengths may seal fewer than others.
void CudaBackend::write_seals(const Layer& layer, size_t l, int32_t* open_ids, int32_t* record_ids) {
  if (layer.seals == 0) return;
  sealed_of_head_.assign(static_cast<size_t>(layer.config.kv_heads), 0);
  std::fill_n(open_ids, layer.seals * layer.config.kv_heads, 0);
  std::fill_n(record_ids, layer.seals * layer.config.kv_heads, kNoRecord);
  const std::span<const Transcode> jobs = plan_->transcodes[l];
  for (size_t i = 0; i < jobs.size(); ++i) {
    fetch_ahead(jobs, i);
    const Transcode& job = jobs[i];
    if (is_thin(layer, job.to())) continue;
    const int page = sealed_of_head_[static_cast<size_t>(job.kv_head)]++;
    const int at = page * layer.config.kv_heads + job.kv_head;
    open_ids[at] = id_of(job.from.handle);
    record_ids[at] = id_of(job.to().handle);
  }
}

void CudaBackend::begin(const StepPlan& plan) {
  use_device();
  if (appends_) check_cuda(cudaStreamSynchronize(beside_->get()), "rows of a step that ended before attend");
  appends_ = false;
  plan_ = &plan;
  keyed_ = false;
  order_.resize(plan.entries.size());
  std::iota(order_.begin(), order_.end(), size_t{0});
  const auto shorter = [&](size_t a, size_t b) { return plan.entries[a].n_tokens < plan.entries[b].n_tokens; };
  if (!std::is_sorted(order_.begin(), order_.end(), shorter)) std::stable_sort(order_.begin(), order_.end(), shorter);
  rows_ = 0;
  for (const StepEntry& entry : plan.entries) rows_ += entry.n_tokens;
  lengths_.clear();
  for (const size_t entry : order_) lengths_.push_back(static_cast<int32_t>(plan.entries[entry].end()));
  write_tables();
  find_patches();
  begin_channels();
  cut_shapes();
  begin_prompts();

  // What goes where.
  size_t bytes = 0, most_query = 0, most_kv = 0, workspace = 0;
  const auto place = [&](size_t count, size_t each) {
    const size_t at = bytes;
    bytes += aligned(count * each);
    return at;
  };
  const size_t places_at = place(static_cast<size_t>(rows_), sizeof(RowPlace));
  // Formats that are cut into the same pieces have one list.
  for (size_t i = 0; i < shapes_.size(); ++i) {
    for (Launch& launch : shapes_[i].launches) {
      workspace = std::max(workspace, launch.workspace_bytes);
      for (size_t j = 0; j < i && !launch.shares_items; ++j) {
        if (!shapes_[j].cut_alike(shapes_[i]) || shapes_[j].lengths != shapes_[i].lengths) continue;
        if (!same_runs(shapes_[j], shapes_[i])) continue;
        for (const Launch& other : shapes_[j].launches) {
          if (other.first != launch.first || other.entries != launch.entries || other.pieces != launch.pieces) continue;
          launch.items_at = other.items_at, launch.thin_items_at = other.thin_items_at;
          launch.shares_items = true;
        }
      }
      if (launch.shares_items) continue;
      launch.items_at = place(launch.items, sizeof(kvmix_cuda_item));
      if (launch.split()) launch.thin_items_at = place(launch.thin_items, sizeof(kvmix_cuda_item));
    }
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    const auto heads = static_cast<size_t>(layer.config.kv_heads), dim = static_cast<size_t>(layer.config.head_dim);
    layer.seals = count_seals(layer, l, false), layer.thin_seals = layer.ids.thins ? count_seals(layer, l, true) : 0;
    layer.open_ids_at = place(static_cast<size_t>(layer.seals) * heads, sizeof(int32_t));
    layer.record_ids_at = place(static_cast<size_t>(layer.seals) * heads, sizeof(int32_t));
    const size_t thin = static_cast<size_t>(layer.thin_seals) * heads;
    for (size_t* ids : {&layer.thin_open_ids_at, &layer.thin_record_ids_at, &layer.thin_ids_at})
      *ids = place(thin, sizeof(int32_t));
    layer.thin_chosen_at = place(thin, static_cast<size_t>(layer.thin.key_width));
    if (layer.ids.governed) layer.dropped_at = place(order_.size() * heads, sizeof(int32_t));
    most_query = std::max(most_query, static_cast<size_t>(layer.config.q_heads) * dim);
    most_kv = std::max(most_kv, heads * dim);
  }
  for (auto& [id, prompt] : prompts_) {
    for (PromptStep::Scored& scored : prompt.layers) scored.heads_at = place(scored.heads.size(), sizeof(WindowHead));
  }
  const size_t patches_at = place(patches_.size(), sizeof(TablePatch));
  const auto rows = static_cast<size_t>(rows_);
  scratch_->queries.reserve(rows * most_query * sizeof(uint16_t), "queries of a step");
  scratch_->outputs.reserve(rows * most_query * sizeof(uint16_t), "outputs of a step");
  if (scratch_->workspace.reserve(workspace, "partial results of attention")) scratch_->clean_bytes = 0;
  if (!device_rows_) {
    scratch_->host_q.reserve(rows * most_query * sizeof(float), "queries from the host");
    scratch_->host_out.reserve(rows * most_query * sizeof(float), "outputs to the host");
    scratch_->host_k.reserve(rows * most_kv * sizeof(float), "keys from the host");
    scratch_->host_v.reserve(rows * most_kv * sizeof(float), "values from the host");
  }

  std::byte* const to = inputs_.begin(bytes);
  auto* const places = reinterpret_cast<RowPlace*>(to + places_at);
  int32_t before = 0;
  for (size_t i = 0; i < order_.size(); ++i) {
    const StepEntry& entry = plan.entries[order_[i]];
    for (int t = 0; t < entry.n_tokens; ++t) {
      places[entry.row + t] = {static_cast<int32_t>(i), static_cast<int32_t>(entry.start + t), before, entry.n_tokens, t};
    }
    before += entry.n_tokens;
  }
  for (const Shape& shape : shapes_) {
    for (const Launch& launch : shape.launches) {
      if (!launch.shares_items) write_work(shape, launch, to);
    }
  }
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    write_seals(layer, l, reinterpret_cast<int32_t*>(to + layer.open_ids_at),
                reinterpret_cast<int32_t*>(to + layer.record_ids_at));
    write_thin_seals(layer, l, to);
    if (!layer.ids.governed) continue;
    std::copy_n(layer.dropped.begin(), order_.size() * static_cast<size_t>(layer.config.kv_heads),
                reinterpret_cast<int32_t*>(to + layer.dropped_at));
  }
  for (const auto& [id, prompt] : prompts_) {
    for (const PromptStep::Scored& scored : prompt.layers) {
      std::copy(scored.heads.begin(), scored.heads.end(), reinterpret_cast<WindowHead*>(to + scored.heads_at));
    }
  }
  std::copy(patches_.begin(), patches_.end(), reinterpret_cast<TablePatch*>(to + patches_at));
  join();
  inputs_.upload(bytes, stream_.get());
  patch_table(tables_.device(0), input<TablePatch>(patches_at), patches_.size(), stream_.get());
  for (const StepEntry& entry : plan.entries) {
    const int32_t row = patched_row_[static_cast<size_t>(&entry - plan.entries.data())];
    if (row >= 0) tables_.revisions[static_cast<size_t>(row)] = entry.pages->revision;
  }
  seals_ = false;
  if (!plan.seals_after_append) seal_all();
}

// What a layer seals must be there when that layer is attended to.
void CudaBackend::seal_all() {
  SealGroup* last = nullptr;
  for (size_t l = 0; l < layers_.size();) {
    SealGroup& group = sealing_[seal_group(l)];
    const size_t first = l;
    bool thins = false;
    seal_jobs_.clear();
    do {
      const Layer& layer = layers_[l++];
      if (layer.seals > 0) seal_jobs_.push_back(seal_job(layer, group.stream.get()));
      thins = thins || layer.thin_seals > 0;
    } while (l < layers_.size() && !begins_group(l));
    group.seals = !seal_jobs_.empty() || thins;
    if (!group.seals) continue;
    if (last == nullptr) planned_.record(stream_.get());
    planned_.make_wait(group.stream.get());
    if (!seal_jobs_.empty()) seal(seal_jobs_);
    for (size_t of = first; thins && of < l; ++of) seal_thin(layers_[of], seal_group(first));
    group.sealed.record(group.stream.get());
    last = &group;
  }
  seals_ = last != nullptr;
  if (!seals_) return;
  for (const SealGroup& group : sealing_) {
    if (group.seals && &group != last) group.sealed.make_wait(last->stream.get());
  }
  sealed_.record(last->stream.get());
}

SealJob CudaBackend::seal_job(const Layer& layer, cudaStream_t stream) const {
  kvmix_cuda_seal_params p{};
  p.format = layer.format;
  p.pages = layer.seals, p.kv_heads = layer.config.kv_heads;
  p.open_pages = open_pages_, p.records = records_;
  p.open_page_stride = p.record_page_stride = kPageUnit;
  p.open_ids = input<int32_t>(layer.open_ids_at), p.record_ids = input<int32_t>(layer.record_ids_at);
  p.stream = stream;
  return seal_job(layer, p, layer.open);
}

void CudaBackend::seal_thin(const Layer& layer, size_t group) {
  if (layer.thin_seals == 0) return;
  kvmix_cuda_seal_params p = seal_job(layer, sealing_[group].stream.get()).params;
  p.pages = layer.thin_seals;
  p.open_ids = input<int32_t>(layer.thin_open_ids_at), p.record_ids = input<int32_t>(layer.thin_record_ids_at);
  seal_thin(layer, p, layer.open, input<int32_t>(layer.thin_ids_at), input<uint8_t>(layer.thin_chosen_at),
            whole_records_[group]);
}

SealJob CudaBackend::seal_job(const Layer& layer, kvmix_cuda_seal_params p, const RecordShape& open) const {
  p.key_transform = layer.key_feedback, p.value_transform = layer.value_feedback;
  return {p,
          {.keys_fitted = layer.keys_fitted,
           .values_fitted = layer.values_fitted,
           .keys_unbiased = layer.keys_unbiased,
           .values_unbiased = layer.values_unbiased,
           .ids_of_heads = true,
           .open = open}};
}

uint64_t CudaBackend::launch_key() {
  if (!prompts_.empty()) return 0;
  Checksum sum;
  const auto add = [&](const auto& number) { sum.update(&number, sizeof number); };
  for (const Shape& shape : shapes_) {
    if (shape.launches.size() != 1 || shape.launches.front().tokens != 1) return 0;
    add(shape.launches.front().items);
    add(shape.launches.front().items_at);
    add(shape.launches.front().thin_items);
    add(shape.launches.front().thin_items_at);
  }
  for (const Layer& layer : layers_) {
    if (layer.ids.governed) add(layer.dropped_at);
  }
  // Waiting costs every layer of a launch, so that one whose step seals nothing does not.
  add(seals_);
  for (const void* memory :
       {static_cast<const void*>(inputs_.device()), static_cast<const void*>(tables_.device(0)),
        static_cast<const void*>(scratch_->queries.data()), static_cast<const void*>(scratch_->outputs.data()),
        static_cast<const void*>(scratch_->workspace.data()), static_cast<const void*>(channels_.data())}) {
    add(memory);
  }
  add(rows_);
  add(tables_.rows());
  add(tables_.stride);
  add(scratch_->workspace.bytes());
  keyed_ = true;
  scratch_->clean_bytes = 0;  // what state a step that is launched again finds the workspace in is not known
  return std::max<uint64_t>(sum.value(), 1);
}

void CudaBackend::append(int layer_index, const float* k, int64_t k_stride, const float* v, int64_t v_stride, Worker worker) {
  if (worker.ith != 0) return;
  use_device();
  const auto& layer = layers_[static_cast<size_t>(layer_index)];
  const int heads = layer.config.kv_heads, dim = layer.config.head_dim;
  const cudaStream_t stream = beside_ ? beside_->get() : stream_.get();
  if (beside_) {
    projected_.record(stream_.get());
    projected_.make_wait(stream);
    appends_ = true;
  }
  if (!device_rows_) {
    const auto width = static_cast<size_t>(heads * dim) * sizeof(float);
    const auto bring = [&](const float*& rows, int64_t& stride, const DeviceMemory& room) {
      check_cuda(cudaMemcpy2DAsync(room.data(), width, rows, static_cast<size_t>(stride) * sizeof(float), width,
                                   static_cast<size_t>(rows_), cudaMemcpyHostToDevice, stream),
                 "append: copy from the host");
      rows = reinterpret_cast<const float*>(room.data());
      stride = heads * dim;
    };
    bring(k, k_stride, scratch_->host_k);
    bring(v, v_stride, scratch_->host_v);
  }
  const auto l = static_cast<size_t>(layer_index);
  const SealGroup& group = sealing_[seal_group(l)];
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (keyed_) check_cuda(cudaStreamIsCapturing(stream_.get(), &capture), "append");
  bool waits = false;
  if (capture == cudaStreamCaptureStatusActive) {
    // In whatever step that seals it is launched, it waits for the sealing of that one. Layers follow each other.
    waits = group.can_seal && seals_ && begins_group(l);
    if (waits) group.sealed.make_wait(stream, cudaEventWaitExternal);
  } else if (layer.seals + layer.thin_seals > 0 && !plan_->seals_after_append) {
    waits = true;
    group.sealed.make_wait(stream);
  }
  append_rows(
      {.k = k,
       .v = v,
       .k_stride = k_stride,
       .v_stride = v_stride,
       .rows = rows_,
       .kv_heads = heads,
       .head_dim = dim,
       .places = input<RowPlace>(0),
       .table = {reinterpret_cast<uint8_t*>(open_pages_), tables_.device(layer.table_at), tables_.stride, layer.config.sinks},
       .dropped = layer.ids.governed ? input<int32_t>(layer.dropped_at) : nullptr,
       .key = layer.key,
       .value = layer.value,
       .open = layer.open,
       .key_panels = layer.key_panels},
      beside_ && !waits, stream);
  if (layer.seals > 0 && plan_->seals_after_append) seal(std::array{seal_job(layer, stream)});
  if (beside_) appended_.record(stream);
}

void CudaBackend::attend(const Layer& layer, const Launch& launch) {
  const LayerConfig& config = layer.config;
  kvmix_cuda_attend_params p = attend_params(shapes_[layer.shape]);
  p.sequences = static_cast<int32_t>(launch.entries) * config.kv_heads;
  p.q_heads = layer.heads_per_kv(), p.kv_heads = 1;
  p.q_tokens = launch.tokens;
  p.scale = config.scale, p.softcap = config.softcap;
  const auto at = static_cast<size_t>(launch.before) * static_cast<size_t>(config.q_heads * config.head_dim) * sizeof(uint16_t);
  p.q = scratch_->queries.data() + at, p.out = scratch_->outputs.data() + at;
  p.records = records_, p.record_page_stride = kPageUnit;
  p.open_pages = open_pages_, p.open_page_stride = kPageUnit;
  p.page_table = tables_.device(layer.table_at) + static_cast<int64_t>(launch.first) * config.kv_heads * tables_.stride;
  p.page_table_stride = tables_.stride;
  p.items = input<kvmix_cuda_item>(launch.items_at), p.item_count = static_cast<int32_t>(launch.items);
  p.workspace = scratch_->workspace.data(), p.workspace_bytes = scratch_->workspace.bytes();
  p.stream = stream_.get();
  // A launch leaves its tickets zero and may write behind them.
  const size_t tickets = workspace_layout(p, launch.split()).ticket_bytes;
  const bool clears = tickets > scratch_->clean_bytes;
  if (clears) check_cuda(cudaMemsetAsync(scratch_->workspace.data(), 0, tickets, stream_.get()), "attend: clear tickets");
  scratch_->clean_bytes = tickets;
  // Fp16 pages are read more slowly by blocks that were there early, where rows were stored beside.
  const bool overlapped = !clears && !(beside_ && uses_fp16_kernel(p));
  OpenPages open{.sink_slots = config.sinks, .shape = layer.open, .overlapped = overlapped};
  if (launch.split()) open.shared_items = static_cast<int32_t>(launch.all_items());
  cuda::attend(p, open);
  if (!launch.split()) return;
  p.items = input<kvmix_cuda_item>(launch.thin_items_at), p.item_count = static_cast<int32_t>(launch.thin_items);
  open.overlapped = true;  // what it reads first is older than the launch for the other pages
  open.key_width = layer.thin.key_width;
  open.channels = reinterpret_cast<const uint8_t*>(channels_.data()) + layer.channels_at + launch.first * layer.channel_bytes();
  cuda::attend(p, open);
}

void CudaBackend::attend(int layer_index, const float* q, int64_t q_stride, float* out, int64_t out_stride, Worker worker) {
  if (worker.ith != 0) return;
  use_device();
  const auto& layer = layers_[static_cast<size_t>(layer_index)];
  const LayerConfig& config = layer.config;
  const int row = config.q_heads * config.head_dim;
  const auto width = static_cast<size_t>(row) * sizeof(float);
  float* to = out;
  int64_t to_stride = out_stride;
  if (!device_rows_) {
    check_cuda(cudaMemcpy2DAsync(scratch_->host_q.data(), width, q, static_cast<size_t>(q_stride) * sizeof(float), width,
                                 static_cast<size_t>(rows_), cudaMemcpyHostToDevice, stream_.get()),
               "attend: copy from the host");
    q = reinterpret_cast<const float*>(scratch_->host_q.data());
    to = reinterpret_cast<float*>(scratch_->host_out.data());
    q_stride = to_stride = row;
  }
  HeadRows job{.q = q,
               .out = nullptr,
               .stride = q_stride,
               .rows = rows_,
               .kv_heads = config.kv_heads,
               .heads_per_kv = layer.heads_per_kv(),
               .head_dim = config.head_dim,
               .places = input<RowPlace>(0),
               .halves = scratch_->queries.data(),
               .ops = layer.query};
  map_queries(job, stream_.get());
  if (beside_) appended_.make_wait(stream_.get());
  appends_ = false;
  for (const Launch& launch : shapes_[layer.shape].launches) attend(layer, launch);
  job.q = nullptr, job.out = to, job.stride = to_stride;
  job.halves = scratch_->outputs.data(), job.ops = layer.output;
  map_outputs(job, stream_.get());
  score_prompts(layer, static_cast<size_t>(layer_index));
  if (device_rows_) return;
  check_cuda(cudaMemcpy2DAsync(out, static_cast<size_t>(out_stride) * sizeof(float), scratch_->host_out.data(), width, width,
                               static_cast<size_t>(rows_), cudaMemcpyDeviceToHost, stream_.get()),
             "attend: copy to the host");
  check_cuda(cudaStreamSynchronize(stream_.get()), "attend");
}

}  // namespace kvmix::cuda
