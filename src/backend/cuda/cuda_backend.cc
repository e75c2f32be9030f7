#include "backend/cuda/cuda_backend.h"

#include <algorithm>
#include <cstring>

#include "attention/cuda/shape.h"
#include "backend/cuda/device.h"
#include "backend/cuda/feedback_panels.h"
#include "base/cuda/launch.h"
#include "codec/row.h"
#include "kvmix/error.h"
#include "rows/scale.h"

namespace kvmix {

std::unique_ptr<Backend> make_cuda_backend(const CacheConfig& config, const FormatTable& formats,
                                           std::vector<LayerFormats> layers, const Backend* beside) {
  cuda::check_device();
  return std::make_unique<cuda::CudaBackend>(config, formats, std::move(layers), static_cast<const cuda::CudaBackend*>(beside));
}

namespace cuda {
namespace {

// [kv_heads][dim][dim], each matrix with rows and columns changed.
std::vector<float> transposed(std::span<const float> matrices, size_t dim) {
  std::vector<float> out(matrices.size());
  for (size_t at = 0; at < out.size(); ++at) {
    const size_t head = at / (dim * dim), row = at / dim % dim, column = at % dim;
    out[(head * dim + column) * dim + row] = matrices[at];
  }
  return out;
}

// As AppendRows takes it, of feedback [kv_heads][dim (dim - 1) / 2].
std::vector<float> panels_of(std::span<const float> feedback, int kv_heads, int dim) {
  const auto width = static_cast<size_t>(dim), heads = static_cast<size_t>(kv_heads);
  std::vector<float> columns(width * width), panels;
  for (size_t h = 0; h < heads; ++h) {
    feedback_columns(feedback.subspan(h * (feedback.size() / heads)).data(), dim, columns.data());
    for (size_t c = 0; c < width; ++c) {
      const float* const column = columns.data() + c * width;
      panels.insert(panels.end(), column + c / kTurnChannels * kTurnChannels, column + width);
    }
  }
  return panels;
}

}  // namespace

Stream::Stream(void* given, bool urgent) : stream_(static_cast<cudaStream_t>(given)), owned_(given == nullptr) {
  if (!owned_) return;
  int least = 0, most = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &most), "stream");
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, urgent ? most : 0), "stream");
}

Stream::~Stream() {
  if (owned_) static_cast<void>(cudaStreamDestroy(stream_));
}

Event::Event() { check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "event"); }

Event::~Event() {
  if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
}

void Event::record(cudaStream_t on) const { check_cuda(cudaEventRecord(event_, on), "event: record"); }

void Event::make_wait(cudaStream_t stream, unsigned flags) const {
  check_cuda(cudaStreamWaitEvent(stream, event_, flags), "event: wait");
}

void Event::wait() const { check_cuda(cudaEventSynchronize(event_), "event: wait"); }

bool CudaBackend::Shape::operator==(const Shape& other) const {
  return std::memcmp(&format, &other.format, sizeof format) == 0 && q_heads == other.q_heads && kv_heads == other.kv_heads &&
         sinks == other.sinks && sliding_window == other.sliding_window && own_layer == other.own_layer;
}

bool CudaBackend::Shape::cut_alike(const Shape& other) const {
  return q_heads == other.q_heads && kv_heads == other.kv_heads && sinks == other.sinks &&
         sliding_window == other.sliding_window && (own_layer < 0) == (other.own_layer < 0);
}

bool CudaBackend::Shape::same_cut(const Shape& other) const {
  return std::memcmp(&format, &other.format, sizeof format) == 0 && cut_alike(other) && lengths == other.lengths;
}

CudaBackend::CudaBackend(const CacheConfig& config, const FormatTable& formats, std::vector<LayerFormats> layers,
                         const CudaBackend* beside)
    : formats_(formats),
      device_(current_device()),
      device_rows_(config.device_rows),
      stream_(config.stream),
      pool_(config.max_bytes, stream_.get()),
      records_(pool_.base()),
      open_pages_(pool_.base()),
      scratch_(beside == nullptr ? std::make_shared<Scratch>() : beside->scratch_) {
  if (config.append_beside) beside_.emplace(nullptr, true);
  layers_.reserve(layers.size());
  for (const LayerFormats& layer : layers) most_kept_ = std::max(most_kept_, layer.kept_queries());
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerConfig& layer = config.layers[l];
    const kvmix_cuda_format format = layer_format(layer, "layer " + std::to_string(l));
    if (page_shared_bytes(layer.head_dim) > most_shared_bytes()) {
      throw Error(Status::kUnsupported, "layer " + std::to_string(l) + ": head_dim " + std::to_string(layer.head_dim) +
                                            " takes " + std::to_string(page_shared_bytes(layer.head_dim)) +
                                            " bytes of a thread block's shared memory, of which this GPU has " +
                                            std::to_string(most_shared_bytes()) +
                                            " (kvmix list --device cuda); take the device \"cpu\"");
    }
    const Shape shape{.format = format,
                      .q_heads = layer.q_heads,
                      .kv_heads = layer.kv_heads,
                      .sinks = layer.sinks,
                      .sliding_window = layer.sliding_window,
                      .own_layer = layers[l].governed || layers[l].thins ? static_cast<int>(l) : -1,
                      .launches = {},
                      .lengths = {}};
    const auto known = std::find(shapes_.begin(), shapes_.end(), shape);
    const auto index = static_cast<size_t>(known - shapes_.begin());
    if (known == shapes_.end()) shapes_.push_back(shape);
    const TransformSpec &k = layer.key.transform, &v = layer.value.transform;
    const auto dim = static_cast<size_t>(layer.head_dim);
    const float* const key_scales = constant(k.scales.empty() ? scale_of(k) : k.scales);  // one of them at most
    const float* const value_scales = constant(v.scales);
    Layer made{.config = layer,
               .ids = layers[l],
               .format = format,
               .open = record_shape(open_format(layer, "layer " + std::to_string(l))),
               .shape = index,
               .key = {constant(k.center), key_scales, nullptr, nullptr, constant(k.matrix), k.hadamard},
               .value = {nullptr, value_scales, nullptr, nullptr, constant(v.matrix), v.hadamard},
               .query = {nullptr, nullptr, key_scales, nullptr, constant(transposed(k.matrix_inverse, dim)), k.hadamard},
               .output = {nullptr, nullptr, nullptr, value_scales, constant(v.matrix_inverse), v.hadamard},
               .keys_fitted = layer.key.codec.fit != Fit::kMinMax,
               .values_fitted = layer.value.codec.fit != Fit::kMinMax,
               .keys_unbiased = layer.key.codec.fit == Fit::kUnbiased,
               .values_unbiased = layer.value.codec.fit == Fit::kUnbiased};
    // A side that stays fp16 has no scales; the other one's kind is the kernel's.
    if (format.key_bits == kF16Bits) made.keys_fitted = made.values_fitted;
    if (format.value_bits == kF16Bits) made.values_fitted = made.keys_fitted;
    made.key_feedback.feedback = constant(k.feedback);
    made.value_feedback.feedback = constant(v.feedback);
    if (!k.feedback.empty() && made.open.key_bits != kF16Bits)
      made.key_panels = constant(panels_of(k.feedback, layer.kv_heads, layer.head_dim));
    if (made.ids.thins) made.thin = thin_shape(layer, formats[made.ids.thin].key.width, "layer " + std::to_string(l));
    layers_.push_back(made);
    kvmix_cuda_attend_params decode = attend_params(shape);
    decode.q_tokens = 1;
    kernels_used_.emplace_back(kernel_name(decode));
    layers_.back().queries_at = room_bytes_;
    room_bytes_ += query_bytes(layers_.back());
    if (layers[l].seals || layers[l].thins) sealing_[seal_group(l)].can_seal = true;
  }
}

CudaBackend::~CudaBackend() {
  for (const SealGroup& group : sealing_) static_cast<void>(cudaStreamSynchronize(group.stream.get()));
  if (beside_) static_cast<void>(cudaStreamSynchronize(beside_->get()));
  static_cast<void>(cudaStreamSynchronize(stream_.get()));
}

void CudaBackend::join() const { sealed_.make_wait(stream_.get()); }

void CudaBackend::use_device() const { check_cuda(cudaSetDevice(device_), "device"); }

// Numbers of the plan on the device; null for none.
const float* CudaBackend::constant(std::span<const float> numbers) {
  if (numbers.empty()) return nullptr;
  DeviceMemory memory;
  memory.reserve(numbers.size_bytes(), "row maps of the plan");
  check_cuda(cudaMemcpy(memory.data(), numbers.data(), numbers.size_bytes(), cudaMemcpyHostToDevice), "row maps: copy");
  constants_.push_back(std::move(memory));
  return reinterpret_cast<const float*>(constants_.back().data());
}

PageHandle CudaBackend::allocate(const PageFormat& format) { return PageHandle{pool_.allocate(format.bytes)} + 1; }

void CudaBackend::release(PageHandle page, const PageFormat& format) {
  pool_.release(static_cast<uint32_t>(page - 1), format.bytes);
}

void CudaBackend::trim() {
  use_device();
  join();  // the pool waits for the stream
  pool_.trim();
}

size_t CudaBackend::scratch_bytes() const {
  const Scratch& s = *scratch_;
  size_t bytes = inputs_.bytes() + tables_.bytes() + s.queries.bytes() + s.outputs.bytes() + s.workspace.bytes();
  for (const DeviceMemory* rows : {&s.host_q, &s.host_k, &s.host_v, &s.host_out}) bytes += rows->bytes();
  for (const DeviceMemory& numbers : constants_) bytes += numbers.bytes();
  for (const DeviceMemory* room : {&window_scores_, &window_sums_, &staged_, &query_squares_, &key_squares_, &channels_})
    bytes += room->bytes();
  for (const DeviceMemory& room : whole_records_) bytes += room.bytes();
  for (const DeviceMemory& room : spare_rooms_) bytes += room.bytes();
  for (const auto& [id, kept] : prompt_queries_) bytes += kept.rooms[0].bytes() + kept.rooms[1].bytes();
  bytes += moves_.bytes();
  return bytes;
}

void CudaBackend::use_blocks(std::byte* blocks) {
  if (layers_.size() != 1) throw Error(Status::kInternal, "blocks of several layers");
  (layers_.front().ids.seals ? records_ : open_pages_) = blocks;
}

PageHandle CudaBackend::in_blocks(size_t offset) const {
  if (offset % kPageUnit != 0 || offset / kPageUnit > static_cast<size_t>(INT32_MAX))
    throw Error(Status::kUnsupported, "a block " + std::to_string(offset) + " bytes behind the first; units of " +
                                          std::to_string(kPageUnit) + " bytes are numbered up to 2147483647");
  return offset / kPageUnit + 1;
}

void CudaBackend::copy(PageHandle from, PageHandle to, const PageFormat& format) {
  use_device();
  join();
  check_cuda(cudaMemcpyAsync(memory(to), memory(from), format.bytes, cudaMemcpyDeviceToDevice, stream_.get()), "copy a page");
}

// Outside of steps; a step's are made by seal.
void CudaBackend::transcode(const Transcode& job) {
  use_device();
  if (!format(job.to()).appendable() || format(job.from).appendable())
    throw Error(Status::kInternal, "a page is sealed outside a step");
  join();
  const Layer& layer = layers_[static_cast<size_t>(job.layer)];
  if (layer.ids.thins && job.from.format == layer.ids.thin) return open_thin(layer, job);
  const int dim = layer.config.head_dim;
  open_record(reinterpret_cast<const uint8_t*>(memory(job.from.handle)), record_shape(layer.format),
              reinterpret_cast<uint8_t*>(memory(job.to().handle)), layer.open,
              layer.key_panels == nullptr ? nullptr : layer.key_panels + job.kv_head * feedback_panel(dim, dim), stream_.get());
}

void CudaBackend::report(CacheStats& stats) const {
  for (const std::string& name : kernels_used_) {
    if (stats.kernel.find(name) == std::string::npos) stats.kernel += (stats.kernel.empty() ? "" : "+") + name;
  }
}

}  // namespace cuda
}  // namespace kvmix
