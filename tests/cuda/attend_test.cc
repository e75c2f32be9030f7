// The CUDA kernels: attention against a double-precision oracle on the same codes, sealing against the CPU codec. What needs a
// GPU skips loudly without one. One long file: its tests share one problem, one oracle and one bound.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/fp16.h"
#include "codec/cuda/seal.h"
#include "codec/tile_layout.h"
#include "codec/trellis.h"
#include "kvmix/codec.h"
#include "kvmix/kvmix_cuda.h"
#include "rows/row_map.h"
#include "support/aligned_bytes.h"

namespace kvmix {
namespace {

#define ASSERT_CUDA(call) ASSERT_EQ(call, cudaSuccess)

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

struct DeviceBytes {
  void* data = nullptr;
  explicit DeviceBytes(size_t bytes) {
    if (cudaMalloc(&data, std::max<size_t>(bytes, 16)) != cudaSuccess) data = nullptr;
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes() { cudaFree(data); }
  template <class T>
  void upload(const std::vector<T>& v) {
    ASSERT_CUDA(cudaMemcpy(data, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
};

struct Case {
  kvmix_cuda_format format;
  int q_heads, kv_heads, q_tokens, sinks, open, sliding_window, slots;
  float softcap;
  std::vector<int32_t> lengths;
  float scale_of_values = 1.0f;
  bool bf16 = false;
  bool new_rows = false;  // the newest rows come with the launch instead of standing in open pages
};

CodecSpec spec_of(const kvmix_cuda_format& f, bool key) {
  const int bits = key ? f.key_bits : f.value_bits;
  if (cuda::is_trellis_width(bits)) return trellis_spec(cuda::code_bits(bits), key ? Side::kKey : Side::kValue);
  CodecSpec spec;
  spec.bits = bits, spec.group = key ? f.key_group : f.value_group;
  spec.axis = key && f.key_per_token == 0 ? Axis::kChannel : Axis::kToken;
  return spec;
}

uint16_t to_bf16(float x) {  // of a float that bf16 holds
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Everything of one case: pages, tables, and the values that the pages stand for.
class World {
 public:
  explicit World(const Case& c) : c_(c), dim_(static_cast<size_t>(c.format.head_dim)), random_(7) {
    EXPECT_EQ(kvmix_cuda_record_bytes(&c.format, &record_bytes_), KVMIX_OK) << kvmix_cuda_last_error();
    key_ = spec_of(c.format, true), value_ = spec_of(c.format, false);
    table_stride_ = 1;
    for (int length : c.lengths) table_stride_ = std::max(table_stride_, pages(length) + 1);
    const size_t sequences = c.lengths.size();
    table_.assign(sequences * static_cast<size_t>(table_stride_), 1 << 30);
    keys_.resize(sequences * static_cast<size_t>(c.kv_heads));
    values_ = keys_;
    for (size_t s = 0; s < sequences; ++s) {
      for (int h = 0; h < c.kv_heads; ++h) {
        keys_[s * static_cast<size_t>(c.kv_heads) + static_cast<size_t>(h)].resize(static_cast<size_t>(c.lengths[s]) * dim_);
        values_[s * static_cast<size_t>(c.kv_heads) + static_cast<size_t>(h)].resize(static_cast<size_t>(c.lengths[s]) * dim_);
      }
      for (int page = 0; page < pages(c.lengths[s]); ++page) add_page(s, page);
    }
    q_.resize(sequences * static_cast<size_t>(c.q_tokens * c.q_heads) * dim_);
    std::normal_distribution<float> normal;
    for (auto& x : q_) {
      x = f32_to_f16(3.0f * normal(random_));
      if (c.bf16) x = to_bf16(f16_to_f32(x));
    }
  }

  int pages(int length) const {
    if (c_.sinks == 0) return (length + kPageTokens - 1) / kPageTokens;
    return length == 0 ? 0 : 1 + (std::max(length - c_.sinks, 0) + kPageTokens - 1) / kPageTokens;
  }
  int first(int page) const { return c_.sinks == 0 ? page * kPageTokens : page == 0 ? 0 : c_.sinks + (page - 1) * kPageTokens; }

  void run(std::vector<uint16_t>* out, std::vector<float>* lse, bool graph = false) const {
    kvmix_cuda_attend_params p{};
    p.format = c_.format;
    p.sequences = static_cast<int32_t>(c_.lengths.size());
    p.q_heads = c_.q_heads, p.kv_heads = c_.kv_heads, p.q_tokens = c_.q_tokens;
    p.sinks = c_.sinks, p.sliding_window = c_.sliding_window, p.softcap = c_.softcap;
    p.bf16 = c_.bf16;
    int32_t count = 0;
    ASSERT_EQ(kvmix_cuda_cut(&p, c_.lengths.data(), c_.slots, nullptr, 0, &count, &p.workspace_bytes), KVMIX_OK)
        << kvmix_cuda_last_error();
    std::vector<kvmix_cuda_item> items(static_cast<size_t>(count));
    ASSERT_EQ(kvmix_cuda_cut(&p, c_.lengths.data(), c_.slots, items.data(), count, &p.item_count, &p.workspace_bytes),
              KVMIX_OK);
    DeviceBytes q(q_.size() * 2), o(q_.size() * 2), l(q_.size() / dim_ * 4), records(records_.size()), open(open_.size() * 2);
    DeviceBytes table(table_.size() * 4), work(items.size() * sizeof items[0]), space(p.workspace_bytes);
    q.upload(q_), records.upload(records_), open.upload(open_), table.upload(table_), work.upload(items);
    ASSERT_CUDA(cudaMemset(space.data, 0, p.workspace_bytes));
    p.q = q.data, p.out = o.data, p.lse = static_cast<float*>(l.data);
    p.records = records.data, p.open_pages = open.data;
    p.record_head_stride = static_cast<int64_t>(record_bytes_), p.record_page_stride = p.record_head_stride * c_.kv_heads;
    p.open_head_stride = static_cast<int64_t>(2 * kPageTokens * dim_ * 2),
    p.open_page_stride = p.open_head_stride * c_.kv_heads;
    p.page_table = static_cast<int32_t*>(table.data), p.page_table_stride = table_stride_;
    p.items = static_cast<kvmix_cuda_item*>(work.data), p.workspace = space.data;
    const size_t new_size = c_.new_rows ? c_.lengths.size() * static_cast<size_t>(c_.q_tokens * c_.kv_heads) * dim_ : 0;
    DeviceBytes new_keys(new_size * 2), new_values(new_size * 2);
    if (c_.new_rows) take_new_rows(&p, open, new_keys, new_values);
    std::vector<uint16_t> again(q_.size());
    out->resize(q_.size()), lse->resize(q_.size() / dim_);
    for (auto* to : {out, &again}) {
      ASSERT_CUDA(cudaMemset(o.data, 0xff, q_.size() * 2));
      cudaStream_t stream = nullptr;
      if (graph) {
        ASSERT_CUDA(cudaStreamCreate(&stream));
        ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        p.stream = stream;
      }
      ASSERT_EQ(kvmix_cuda_attend(&p), KVMIX_OK) << kvmix_cuda_last_error();
      if (graph) {
        cudaGraph_t captured;
        cudaGraphExec_t executable;
        ASSERT_CUDA(cudaStreamEndCapture(stream, &captured));
        ASSERT_CUDA(cudaGraphInstantiate(&executable, captured, 0));
        for (int i = 0; i < 3; ++i) ASSERT_CUDA(cudaGraphLaunch(executable, stream));
        ASSERT_CUDA(cudaStreamSynchronize(stream));
        ASSERT_CUDA(cudaGraphExecDestroy(executable));
        ASSERT_CUDA(cudaGraphDestroy(captured));
        ASSERT_CUDA(cudaStreamDestroy(stream));
      }
      ASSERT_CUDA(cudaDeviceSynchronize());
      ASSERT_CUDA(cudaMemcpy(to->data(), o.data, q_.size() * 2, cudaMemcpyDeviceToHost));
    }
    EXPECT_EQ(*out, again) << "a second launch differs";
    ASSERT_CUDA(cudaMemcpy(lse->data(), l.data, lse->size() * 4, cudaMemcpyDeviceToHost));
  }

  float number(uint16_t h) const { return c_.bf16 ? from_bf16(h) : f16_to_f32(h); }

  // Largest error of a row and of a log-sum-exp, as a share of what the formats imply. Operands are rounded to fp16 once (the
  // query times the key scales, or the dequantised key; weights times value scales, or the dequantised value; codes count from
  // zero, so twice the largest magnitude bounds a product), each by 2^-11 of itself at most, and the errors add up as
  // independent ones do. A score that is off by e moves the output by e |v| at most; four more roundings are the weights'
  // (before and after a value scale) and the output's.
  void compare(const std::vector<uint16_t>& out, const std::vector<float>& lse, double* worst, double* worst_lse) const {
    const int group = c_.q_heads / c_.kv_heads;
    const double round = 1.0 / 2048.0, scale = 1.0 / std::sqrt(static_cast<double>(dim_));
    *worst = *worst_lse = 0.0;
    for (size_t s = 0; s < c_.lengths.size(); ++s) {
      for (int t = 0; t < c_.q_tokens; ++t) {
        for (int h = 0; h < c_.q_heads; ++h) {
          const size_t row = (s * static_cast<size_t>(c_.q_tokens) + static_cast<size_t>(t)) * static_cast<size_t>(c_.q_heads) +
                             static_cast<size_t>(h);
          const size_t kv = s * static_cast<size_t>(c_.kv_heads) + static_cast<size_t>(h / group);
          const int end = c_.lengths[s] - (c_.q_tokens - 1 - t);
          const int begin = c_.sliding_window > 0 ? std::max(end - c_.sliding_window, 0) : 0;
          std::vector<double> score, most_key(dim_, 0.0), most_value(dim_, 0.0), expected(dim_, 0.0);
          double top = -INFINITY, sum = 0.0;
          for (int i = begin; i < end; ++i) {
            double x = 0.0;
            for (size_t c = 0; c < dim_; ++c) {
              const double k = keys_[kv][static_cast<size_t>(i) * dim_ + c];
              x += number(q_[row * dim_ + c]) * k;
              most_key[c] = std::max(most_key[c], std::abs(k));
              most_value[c] = std::max(most_value[c], std::abs(values_[kv][static_cast<size_t>(i) * dim_ + c]));
            }
            x *= scale;
            if (c_.softcap > 0.0f) x = c_.softcap * std::tanh(x / c_.softcap);
            score.push_back(x), top = std::max(top, x);
          }
          for (int i = begin; i < end; ++i) {
            const double w = std::exp(score[static_cast<size_t>(i - begin)] - top);
            sum += w;
            for (size_t c = 0; c < dim_; ++c) expected[c] += w * values_[kv][static_cast<size_t>(i) * dim_ + c];
          }
          double noise = 0.0, size = 0.0, error = 0.0;
          for (size_t c = 0; c < dim_; ++c) {
            const double want = sum > 0.0 ? expected[c] / sum : 0.0, got = number(out[row * dim_ + c]);
            ASSERT_FALSE(std::isnan(got)) << "sequence " << s << " head " << h << " channel " << c;
            const double part = 2.0 * number(q_[row * dim_ + c]) * most_key[c];
            noise += part * part, size += most_value[c] * most_value[c], error += (want - got) * (want - got);
          }
          const double allowed = round * ((c_.bf16 ? 8.0 : 4.0) + scale * std::sqrt(noise));
          if (begin >= end) {
            EXPECT_EQ(lse[row], -INFINITY);
            EXPECT_EQ(error, 0.0);
          } else {
            *worst = std::max(*worst, std::sqrt(error / size) / allowed);
            *worst_lse = std::max(*worst_lse, std::abs(lse[row] - (top + std::log(sum))) / allowed);
          }
        }
      }
    }
  }

 private:
  // Moves the newest rows out of the open pages, leaving NaNs, into arrays [sequence][kv head][token][channel].
  void take_new_rows(kvmix_cuda_attend_params* p, DeviceBytes& open, DeviceBytes& new_keys, DeviceBytes& new_values) const {
    std::vector<uint16_t> pages = open_, rows[2];
    const auto heads = static_cast<size_t>(c_.kv_heads), tokens = static_cast<size_t>(c_.q_tokens);
    for (auto& r : rows) r.assign(c_.lengths.size() * heads * tokens * dim_, 0);
    for (size_t s = 0; s < c_.lengths.size(); ++s) {
      for (int t = 0; t < c_.q_tokens; ++t) {
        const int position = c_.lengths[s] - c_.q_tokens + t;
        if (position < 0) continue;
        int page = 0;
        while (page + 1 < this->pages(c_.lengths[s]) && first(page + 1) <= position) ++page;
        const int32_t id = table_[s * static_cast<size_t>(table_stride_) + static_cast<size_t>(page)];
        ASSERT_LT(id, 0) << "the newest rows must lie in open pages";
        for (size_t h = 0; h < heads; ++h) {
          for (size_t side = 0; side < 2; ++side) {
            for (size_t c = 0; c < dim_; ++c) {
              uint16_t& from = pages[(static_cast<size_t>(~id) * heads + h) * 2 * kPageTokens * dim_ +
                                     (side * kPageTokens + static_cast<size_t>(position - first(page))) * dim_ + c];
              rows[side][((s * heads + h) * tokens + static_cast<size_t>(t)) * dim_ + c] =
                  c_.bf16 ? to_bf16(f16_to_f32(from)) : from;
              from = 0x7e00;
            }
          }
        }
      }
    }
    open.upload(pages), new_keys.upload(rows[0]), new_values.upload(rows[1]);
    p->new_keys = new_keys.data, p->new_values = new_values.data;
    p->new_token_stride = static_cast<int64_t>(dim_ * 2), p->new_head_stride = p->new_token_stride * c_.q_tokens;
    p->new_sequence_stride = p->new_head_stride * c_.kv_heads;
  }

  void add_page(size_t s, int page) {
    const int length = c_.lengths[s], begin = first(page), room = page == 0 && c_.sinks > 0 ? c_.sinks : kPageTokens;
    const int live = std::min(room, length - begin);
    const bool open = live < kPageTokens || begin + kPageTokens > length - c_.open;
    std::normal_distribution<float> normal;
    const size_t heads = static_cast<size_t>(c_.kv_heads);
    table_[s * static_cast<size_t>(table_stride_) + static_cast<size_t>(page)] =
        open ? ~static_cast<int32_t>(open_.size() / (heads * 2 * kPageTokens * dim_))
             : static_cast<int32_t>(records_.size() / (heads * record_bytes_));
    for (size_t h = 0; h < heads; ++h) {
      std::vector<uint16_t> k(kPageTokens * dim_, 0x7e00), v = k;
      for (size_t i = 0; i < static_cast<size_t>(live) * dim_; ++i) {
        k[i] = f32_to_f16(normal(random_) * (i % dim_ == 5 ? 12.0f : 1.0f) + static_cast<float>(i % 3));
        v[i] = f32_to_f16((normal(random_) + 0.5f) * c_.scale_of_values);
        if (c_.new_rows && c_.bf16) {  // numbers that both types hold
          k[i] = f32_to_f16(from_bf16(to_bf16(f16_to_f32(k[i])))), v[i] = f32_to_f16(from_bf16(to_bf16(f16_to_f32(v[i]))));
        }
      }
      auto& keys = keys_[s * heads + h];
      auto& values = values_[s * heads + h];
      if (open) {
        open_.insert(open_.end(), k.begin(), k.end());
        open_.insert(open_.end(), v.begin(), v.end());
        for (size_t i = 0; i < static_cast<size_t>(live) * dim_; ++i) {
          keys[static_cast<size_t>(begin) * dim_ + i] = f16_to_f32(k[i]);
          values[static_cast<size_t>(begin) * dim_ + i] = f16_to_f32(v[i]);
        }
        continue;
      }
      AlignedBytes key_tile(tile_bytes(key_, c_.format.head_dim)), value_tile(tile_bytes(value_, c_.format.head_dim));
      encode_tile(key_, Side::kKey, c_.format.head_dim, k.data(), key_tile.data());
      encode_tile(value_, Side::kValue, c_.format.head_dim, v.data(), value_tile.data());
      const size_t at = records_.size();
      records_.resize(at + record_bytes_);
      EXPECT_EQ(kvmix_cuda_record_from_tiles(&c_.format, key_tile.data(), value_tile.data(), records_.data() + at), KVMIX_OK);
      AlignedBytes key_back(key_tile.size()), value_back(value_tile.size());
      EXPECT_EQ(kvmix_cuda_tiles_from_record(&c_.format, records_.data() + at, key_back.data(), value_back.data()), KVMIX_OK);
      EXPECT_TRUE(key_back == key_tile);
      EXPECT_TRUE(value_back == value_tile);
      decode(key_, Side::kKey, key_tile, &keys[static_cast<size_t>(begin) * dim_]);
      decode(value_, Side::kValue, value_tile, &values[static_cast<size_t>(begin) * dim_]);
    }
  }

  void decode(const CodecSpec& spec, Side side, const AlignedBytes& tile, double* out) const {
    const int dim = static_cast<int>(dim_);
    if (spec.is_f16()) {
      for (size_t i = 0; i < kPageTokens * dim_; ++i) out[i] = f16_to_f32(reinterpret_cast<const uint16_t*>(tile.data())[i]);
      return;
    }
    if (is_trellis(spec)) {  // exact but for the offset's sum, as a float
      std::vector<float> x(kPageTokens * dim_);
      decode_tile(spec, side, dim, tile.data(), x.data());
      std::copy(x.begin(), x.end(), out);
      return;
    }
    const auto* bytes = reinterpret_cast<const uint8_t*>(tile.data());
    const int count = scale_count(spec, dim);
    const uint8_t* codes = bytes + (count * 4 + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    const auto* scales = reinterpret_cast<const uint16_t*>(bytes);
    const TileGeometry geometry = tile_geometry(side, dim);
    for (int t = 0; t < kPageTokens; ++t) {
      for (int c = 0; c < dim; ++c) {
        const int lane = side == Side::kKey ? t : c, reduce = side == Side::kKey ? c : t;
        const int code = get_code(spec.bits, codes, unit_index(geometry, lane, reduce), byte_in_unit(lane, reduce));
        const int index = scale_index(spec, dim, t, c);
        out[t * dim + c] = f16_to_f32(scales[count + index]) +
                           static_cast<double>(f16_to_f32(scales[index])) * (code - ((1 << spec.bits) - 1) * 0.5);
      }
    }
  }

  Case c_;
  size_t dim_;
  std::mt19937 random_;
  CodecSpec key_, value_;
  size_t record_bytes_ = 0;
  int table_stride_ = 1;
  std::vector<uint8_t> records_;
  std::vector<uint16_t> open_, q_;
  std::vector<int32_t> table_;
  std::vector<std::vector<double>> keys_, values_;
};

// Every pair of widths at every head_dim, groups in turn, and fp16 on both sides; then what the page kernel takes: one fp16
// side, keys with a scale per token, many value groups, records too large for the decode kernel. Trellises of every width at
// every head_dim, of one and of two widths, and beside every width of even codes, fp16 and keys with a scale per token.
std::vector<kvmix_cuda_format> formats() {
  constexpr int kWidths[] = {1, 2, 3, 4, 8}, kDims[] = {64, 96, 128, 256}, kGroups[] = {32, 64, 128};
  std::vector<kvmix_cuda_format> all;
  for (const int dim : kDims) {
    for (const int k : kWidths) {
      for (const int v : kWidths) {
        const size_t n = all.size();
        all.push_back({dim, k, v, kGroups[n % 3], kGroups[(n / 3 + n) % 3], 0});
      }
    }
    for (const int g : kGroups) all.push_back({dim, 2, 2, g, 64, 0});
  }
  for (const int dim : kDims) all.push_back({dim, 16, 16, 128, 128, 0});
  const kvmix_cuda_format others[] = {{64, 8, 16, 64, 64, 0},  {96, 4, 4, 32, 128, 1},   {96, 16, 2, 128, 32, 0},
                                      {128, 3, 16, 32, 32, 0}, {128, 2, 2, 128, 128, 1}, {128, 8, 3, 32, 64, 1},
                                      {256, 3, 4, 64, 32, 0},  {256, 1, 8, 128, 64, 1}};
  all.insert(all.end(), std::begin(others), std::end(others));
  for (const int dim : kDims) {
    for (const int bits : {2, 3, 4, 5}) all.push_back({dim, cuda::kTrellis + bits, cuda::kTrellis + bits, 128, 128, 0});
    all.push_back({dim, cuda::kTrellis + 4, cuda::kTrellis + 2, 128, 128, 0});
    all.push_back({dim, cuda::kTrellis + 3, cuda::kTrellis + 5, 128, 128, 0});
  }
  for (const int width : {1, 2, 3, 4, 8, 16}) {
    const size_t n = all.size();
    all.push_back({kDims[n % 4], width, cuda::kTrellis + 2 + static_cast<int>(n % 4), kGroups[n % 3], 128, 0});
    all.push_back({kDims[(n + 1) % 4], cuda::kTrellis + 2 + static_cast<int>((n + 2) % 4), width, 128, kGroups[n % 3], 0});
  }
  all.push_back({128, 4, cuda::kTrellis + 3, 64, 128, 1});
  all.push_back({256, 2, cuda::kTrellis + 4, 128, 128, 1});
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return std::memcmp(&a, &b, sizeof a) < 0; });
  all.erase(
      std::unique(all.begin(), all.end(), [](const auto& a, const auto& b) { return std::memcmp(&a, &b, sizeof a) == 0; }),
      all.end());
  return all;
}

void check(const Case& c) {
  World world(c);
  std::vector<uint16_t> out;
  std::vector<float> lse;
  world.run(&out, &lse);
  if (::testing::Test::HasFatalFailure()) return;
  double worst = 0.0, worst_lse = 0.0;
  world.compare(out, lse, &worst, &worst_lse);
  EXPECT_LT(worst, 1.0);
  EXPECT_LT(worst_lse, 1.0);
  std::printf("  heads %d/%d tokens %d sinks %d open %d window %d cap %g: error %.2g, log-sum-exp %.2g of the bound\n",
              c.q_heads, c.kv_heads, c.q_tokens, c.sinks, c.open, c.sliding_window, static_cast<double>(c.softcap), worst,
              worst_lse);
}

class CudaAttend : public ::testing::TestWithParam<kvmix_cuda_format> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "NO GPU: the CUDA kernels were not run";
  }
};

const std::vector<int32_t> kRagged = {0, 1, 127, 128, 129, 700, 2048, 16};

TEST_P(CudaAttend, MultiHead) { check({GetParam(), 3, 3, 1, 0, 0, 0, 0, 0.0f, kRagged}); }
TEST_P(CudaAttend, Grouped4) { check({GetParam(), 8, 2, 1, 0, 0, 0, 16, 0.0f, kRagged}); }
TEST_P(CudaAttend, Grouped8) { check({GetParam(), 8, 1, 1, 0, 0, 0, 16, 0.0f, kRagged}); }
TEST_P(CudaAttend, Grouped7) { check({GetParam(), 14, 2, 1, 4, 100, 0, 16, 0.0f, {0, 5, 260, 1111}}); }
TEST_P(CudaAttend, Grouped12) { check({GetParam(), 12, 1, 1, 0, 0, 0, 16, 0.0f, {1, 260, 1111}}); }
TEST_P(CudaAttend, Grouped16) { check({GetParam(), 32, 2, 1, 0, 128, 0, 0, 0.0f, kRagged, 1.0f, true}); }
TEST_P(CudaAttend, SinksAndWindow) {
  check({GetParam(), 6, 2, 1, 16, 200, 0, 0, 0.0f, {0, 1, 15, 16, 17, 143, 144, 145, 1500}});
}
TEST_P(CudaAttend, OpenPagesAlone) { check({GetParam(), 8, 2, 1, 16, 4096, 0, 16, 0.0f, kRagged}); }
TEST_P(CudaAttend, OpenPagesInAWindow) { check({GetParam(), 7, 1, 2, 4, 4096, 300, 0, 0.0f, {2, 299, 301, 1024, 1111}}); }
TEST_P(CudaAttend, SpeculativeTokens) { check({GetParam(), 4, 2, 4, 16, 128, 0, 8, 0.0f, {4, 5, 130, 147, 900}}); }
TEST_P(CudaAttend, SlidingWindow) { check({GetParam(), 4, 1, 2, 0, 128, 300, 0, 0.0f, {2, 299, 301, 1024, 1111}}); }
TEST_P(CudaAttend, SoftCap) { check({GetParam(), 4, 2, 1, 0, 64, 0, 0, 20.0f, {1, 128, 900}}); }
TEST_P(CudaAttend, Bfloat16) { check({GetParam(), 4, 2, 1, 0, 64, 0, 0, 0.0f, {1, 128, 900}, 1.0f, true}); }
TEST_P(CudaAttend, EightTokensGrouped4) { check({GetParam(), 4, 1, 8, 4, 128, 0, 16, 0.0f, {8, 9, 260, 1111}}); }
TEST_P(CudaAttend, NewRows) { check({GetParam(), 4, 2, 1, 16, 128, 0, 16, 0.0f, {0, 1, 16, 17, 145, 900}, 1.0f, false, true}); }
TEST_P(CudaAttend, NewRowsOfSeveralTokens) {
  check({GetParam(), 2, 2, 4, 0, 256, 0, 16, 0.0f, {4, 130, 128, 901}, 1.0f, true, true});
}
TEST_P(CudaAttend, Prefill) { check({GetParam(), 4, 2, 150, 16, 256, 0, 0, 0.0f, {150, 161, 700}}); }
TEST_P(CudaAttend, PrefillSlidingWindow) { check({GetParam(), 2, 1, 130, 0, 130, 100, 0, 30.0f, {130, 400}}); }
TEST_P(CudaAttend, LongContext) { check({GetParam(), 4, 1, 1, 16, 128, 0, 0, 0.0f, {20000}}); }
TEST_P(CudaAttend, SmallValues) { check({GetParam(), 2, 2, 1, 0, 128, 0, 0, 0.0f, {1024}, 1e-3f}); }
TEST_P(CudaAttend, LargeValues) { check({GetParam(), 2, 2, 1, 0, 128, 0, 0, 0.0f, {1024}, 3000.0f}); }

// Chunks of every kind of length, over tiles of query rows that lie across pages, with sealed pages and open ones before them.
class CudaPrefill : public ::testing::TestWithParam<kvmix_cuda_format> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "NO GPU: the CUDA kernels were not run";
  }
};

TEST_P(CudaPrefill, ChunksOfEveryLength) {
  for (const int tokens : {1, 17, 33, 64, 65, 66, 100, 127, 128, 129, 192, 255, 256, 257, 300}) {
    check({GetParam(), 1, 1, tokens, 0, 0, 0, 0, 0.0f, {tokens, tokens + 1, tokens + 128}});
  }
}
TEST_P(CudaPrefill, GroupedHeads) {
  for (const int group : {2, 3, 4, 8}) {
    for (const int tokens : {9, 40, 130}) check({GetParam(), 2 * group, 2, tokens, 0, 0, 0, 0, 0.0f, {tokens, 3 * tokens + 5}});
  }
}
TEST_P(CudaPrefill, ShorterThanTheChunk) { check({GetParam(), 2, 1, 200, 0, 0, 0, 0, 0.0f, {0, 1, 130, 199, 200}}); }
TEST_P(CudaPrefill, SealedThenOpenPages) {
  for (const int open : {1, 128, 200, 512}) check({GetParam(), 4, 2, 150, 0, open, 0, 0, 0.0f, {150, 384, 700, 1111}});
}
TEST_P(CudaPrefill, Sinks) {
  for (const int sinks : {1, 16, 64, 65, 128}) check({GetParam(), 2, 2, 150, sinks, 100, 0, 0, 0.0f, {150, 161, 700, 1025}});
}
TEST_P(CudaPrefill, SlidingWindows) {
  for (const int window : {1, 50, 128, 400, 5000}) check({GetParam(), 4, 2, 140, 4, 128, window, 0, 0.0f, {140, 400, 1300}});
}
TEST_P(CudaPrefill, SoftCap) { check({GetParam(), 4, 2, 140, 0, 128, 0, 0, 20.0f, {140, 400}}); }
TEST_P(CudaPrefill, SoftCapSlidingWindowBfloat16) {
  check({GetParam(), 6, 2, 140, 16, 128, 300, 0, 30.0f, {140, 700, 144}, 1.0f, true});
}
TEST_P(CudaPrefill, Bfloat16) { check({GetParam(), 4, 2, 140, 0, 128, 0, 0, 0.0f, {140, 400}, 1.0f, true}); }
TEST_P(CudaPrefill, SmallValues) { check({GetParam(), 2, 2, 130, 0, 0, 0, 0, 0.0f, {512}, 1e-3f}); }
TEST_P(CudaPrefill, LargeValues) { check({GetParam(), 2, 2, 130, 0, 0, 0, 0, 0.0f, {512}, 3000.0f}); }
TEST_P(CudaPrefill, LongContext) { check({GetParam(), 1, 1, 130, 16, 128, 0, 0, 0.0f, {20000}}); }
// From 512 query rows a KV head on, and of many lists from 257, pages may be dequantised before.
TEST_P(CudaPrefill, ManyChunks) {
  const std::vector<int> lengths = {257, 258, 300, 385, 390, 1000};  // times 8 KV heads and three tiles
  for (const int tokens : {256, 257, 300}) check({GetParam(), 8, 8, tokens, 4, 128, 0, 0, 0.0f, lengths});
  check({GetParam(), 16, 8, 150, 0, 128, 200, 0, 20.0f, lengths});
}
TEST_P(CudaPrefill, LongChunks) {
  for (const int tokens : {511, 512, 513}) check({GetParam(), 1, 1, tokens, 0, 0, 0, 0, 0.0f, {tokens, tokens + 129, 1300}});
}
TEST_P(CudaPrefill, LongChunksOfGroupedHeads) {
  check({GetParam(), 6, 2, 260, 0, 128, 0, 0, 0.0f, {0, 1, 259, 260, 700, 1111}});
}
TEST_P(CudaPrefill, LongChunksWithSinks) {
  for (const int sinks : {4, 65, 128}) check({GetParam(), 4, 2, 260, sinks, 200, 0, 0, 0.0f, {260, 391, 1025}});
}
TEST_P(CudaPrefill, LongChunksInSlidingWindows) {
  for (const int window : {1, 100, 400}) check({GetParam(), 4, 2, 260, 4, 128, window, 0, 20.0f, {260, 400, 1300}, 1.0f, true});
}
TEST_P(CudaPrefill, Graph) {
  for (const int tokens : {100, 260}) {
    World world({GetParam(), 4, 2, tokens, 0, 64, 0, 0, 0.0f, {700, 1111}});
    std::vector<uint16_t> direct, replayed;
    std::vector<float> lse;
    world.run(&direct, &lse);
    world.run(&replayed, &lse, true);
    EXPECT_EQ(direct, replayed);
  }
}

struct SealCase {
  bool fitted, center, scales, hadamard, feedback;
  bool extreme = false;  // pages of a channel far from zero among small numbers, of zeros in between, of nothing but zeros
};

// What the CPU makes of a page: rows of keys and values, fp16 [token][channel], to the record.
std::vector<uint8_t> sealed_record(const kvmix_cuda_format& format, const SealCase& c, const RowMapChain (&maps)[2], int head,
                                   const uint16_t* keys, const uint16_t* values) {
  const int head_dim = format.head_dim;
  const auto dim = static_cast<size_t>(head_dim);
  size_t bytes = 0;
  EXPECT_EQ(kvmix_cuda_record_bytes(&format, &bytes), KVMIX_OK);
  std::vector<AlignedBytes> tiles;
  for (const bool key : {true, false}) {
    const RowMapChain& map = maps[key ? 0 : 1];
    const Side side = key ? Side::kKey : Side::kValue;
    CodecSpec spec = spec_of(format, key);
    if (c.fitted && !is_trellis(spec)) spec.fit = Fit::kLeastSquares;
    std::vector<uint16_t> rows(kPageTokens * dim);
    for (size_t t = 0; t < kPageTokens; ++t) {
      float row[256];
      for (size_t i = 0; i < dim; ++i) row[i] = f16_to_f32((key ? keys : values)[t * dim + i]);
      map.store(head, row);
      for (size_t i = 0; i < dim; ++i) rows[t * dim + i] = f32_to_f16(row[i]);
    }
    tiles.emplace_back(tile_bytes(spec, head_dim));
    encode_tile(spec, side, head_dim, rows.data(), tiles.back().data());
    if (c.feedback && !spec.is_f16()) {
      feedback_tile(spec, side, head_dim, rows.data(), map.feedback(head), tiles.back().data());
    }
  }
  std::vector<uint8_t> record(bytes);
  EXPECT_EQ(kvmix_cuda_record_from_tiles(&format, tiles[0].data(), tiles[1].data(), record.data()), KVMIX_OK);
  return record;
}

// Records sealed on the GPU equal those converted from the CPU codec's tiles of rows that RowMapChain::store changed, byte for
// byte.
void check_seal(const kvmix_cuda_format& format, const SealCase& c) {
  constexpr int kPages = 3, kHeads = 2;
  const int head_dim = format.head_dim;
  const auto dim = static_cast<size_t>(head_dim);
  size_t bytes = 0;
  ASSERT_EQ(kvmix_cuda_record_bytes(&format, &bytes), KVMIX_OK);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> open(kPages * kHeads * 2 * kPageTokens * dim);
  for (size_t i = 0; i < open.size(); ++i)
    open[i] = i % 997 == 0 && format.key_bits != 16 && format.value_bits != 16
                  ? 0x7c00
                  : f32_to_f16(normal(random) * (i % dim == 5 ? 12.0f : 1.0f));
  for (size_t i = 0; i < kPageTokens * dim; i += dim) open[i + 9] = f32_to_f16(0.25f);     // a constant channel
  for (size_t i = 0; i < kPageTokens * dim; i += dim) open[i + 11] = i == 0 ? 0x8000 : 0;  // zeros of both signs
  for (size_t i = 0; c.extreme && i < open.size(); ++i) {
    const size_t page = i / (kHeads * 2 * kPageTokens * dim), token = i / dim % kPageTokens;
    if (page == 0) open[i] = f32_to_f16(i % dim == 9 ? 60000.0f : 0.01f * normal(random));
    if (page == 2 || (page == 1 && token % 3 == 0)) open[i] = 0;
  }
  TransformSpec transforms[2];
  for (int side = 0; side < 2; ++side) {
    TransformSpec& t = transforms[side];
    t.hadamard = c.hadamard;
    if (c.center && side == 0) t.center.resize(kHeads * dim);
    if (c.scales) t.scales.resize(kHeads * dim);
    if (c.feedback) t.feedback.resize(kHeads * dim * (dim - 1) / 2);
    for (float& x : t.center) x = normal(random);
    for (float& x : t.scales) x = (0.5f + std::abs(normal(random))) * (random() % 2 == 0 ? 1.0f : -1.0f);
    for (float& x : t.feedback) x = 0.1f * normal(random);
  }
  const std::vector<int32_t> open_ids = {0, 1, 2}, record_ids = {2, 0, 1};
  DeviceBytes pages(open.size() * 2), from(12), to(12), records(kPages * kHeads * bytes);
  DeviceBytes center(transforms[0].center.size() * 4), key_scales(transforms[0].scales.size() * 4),
      value_scales(transforms[1].scales.size() * 4), key_feedback(transforms[0].feedback.size() * 4),
      value_feedback(transforms[1].feedback.size() * 4);
  pages.upload(open), from.upload(open_ids), to.upload(record_ids);
  center.upload(transforms[0].center), key_scales.upload(transforms[0].scales), value_scales.upload(transforms[1].scales);
  key_feedback.upload(transforms[0].feedback), value_feedback.upload(transforms[1].feedback);
  kvmix_cuda_seal_params p{};
  p.format = format, p.pages = kPages, p.kv_heads = kHeads, p.fitted = c.fitted;
  p.open_pages = pages.data, p.open_head_stride = static_cast<int64_t>(2 * kPageTokens * dim * 2),
  p.open_page_stride = kHeads * p.open_head_stride;
  p.records = records.data, p.record_head_stride = static_cast<int64_t>(bytes),
  p.record_page_stride = kHeads * p.record_head_stride;
  p.open_ids = static_cast<int32_t*>(from.data), p.record_ids = static_cast<int32_t*>(to.data);
  const auto pointer = [](bool there, const DeviceBytes& b) { return there ? static_cast<const float*>(b.data) : nullptr; };
  p.key_transform = {pointer(c.center, center), pointer(c.scales, key_scales), pointer(c.feedback, key_feedback), c.hadamard};
  p.value_transform = {nullptr, pointer(c.scales, value_scales), pointer(c.feedback, value_feedback), c.hadamard};
  ASSERT_EQ(kvmix_cuda_seal(&p), KVMIX_OK) << kvmix_cuda_last_error();
  ASSERT_CUDA(cudaDeviceSynchronize());
  std::vector<uint8_t> got(kPages * kHeads * bytes);
  ASSERT_CUDA(cudaMemcpy(got.data(), records.data, got.size(), cudaMemcpyDeviceToHost));
  const RowMapChain maps[2] = {{transforms[0], {Side::kKey, kHeads, head_dim}, "keys"},
                               {transforms[1], {Side::kValue, kHeads, head_dim}, "values"}};
  for (size_t page = 0; page < kPages; ++page) {
    for (size_t head = 0; head < kHeads; ++head) {
      const uint16_t* const rows = open.data() + (page * kHeads + head) * 2 * kPageTokens * dim;
      const auto want = sealed_record(format, c, maps, static_cast<int>(head), rows, rows + kPageTokens * dim);
      const auto at = static_cast<size_t>(record_ids[page]) * kHeads + head;
      EXPECT_EQ(std::memcmp(want.data(), got.data() + at * bytes, bytes), 0) << "page " << page << " head " << head;
    }
  }
}

TEST_P(CudaAttend, SealMinMax) { check_seal(GetParam(), {false, false, false, false, false}); }
TEST_P(CudaAttend, SealFitted) { check_seal(GetParam(), {true, false, false, false, false}); }
TEST_P(CudaAttend, SealCentred) { check_seal(GetParam(), {true, true, false, false, false}); }
TEST_P(CudaAttend, SealRotated) { check_seal(GetParam(), {false, true, false, true, false}); }
TEST_P(CudaAttend, SealScaledAndRotated) { check_seal(GetParam(), {true, true, true, true, false}); }
TEST_P(CudaAttend, SealWithFeedback) { check_seal(GetParam(), {false, false, false, false, true}); }
TEST_P(CudaAttend, SealWithAll) { check_seal(GetParam(), {true, true, true, true, true}); }

class CudaSealTrellis : public CudaAttend {};

TEST_P(CudaSealTrellis, AsTheyAre) { check_seal(GetParam(), {false, false, false, false, false}); }
TEST_P(CudaSealTrellis, Fitted) { check_seal(GetParam(), {true, true, false, false, false}); }
TEST_P(CudaSealTrellis, Rotated) { check_seal(GetParam(), {false, true, true, true, false}); }
TEST_P(CudaSealTrellis, WithFeedback) { check_seal(GetParam(), {false, false, false, false, true}); }
TEST_P(CudaSealTrellis, WithAll) { check_seal(GetParam(), {true, true, true, true, true}); }
TEST_P(CudaSealTrellis, Extremes) { check_seal(GetParam(), {false, false, false, false, false, true}); }
TEST_P(CudaSealTrellis, ExtremesWithFeedback) { check_seal(GetParam(), {false, false, false, false, true, true}); }

// Open pages of 8-bit rows; two layers of other widths in one call, ids of heads, some of which are no work.
TEST_P(CudaSealTrellis, LayersOfHeadsFromEightBits) {
  constexpr int kPages = 2, kHeads = 2, kLayers = 2;
  const kvmix_cuda_format format = GetParam();
  const int head_dim = format.head_dim;
  const auto dim = static_cast<size_t>(head_dim);
  kvmix_cuda_format formats[kLayers] = {format, format};
  std::swap(formats[1].key_bits, formats[1].value_bits);
  std::swap(formats[1].key_group, formats[1].value_group);
  if (cuda::is_trellis_width(formats[1].key_bits)) formats[1].key_per_token = 0;
  const kvmix_cuda_format rows{head_dim, 8, 8, 128, 128, 1};
  size_t open_bytes = 0, bytes = 0, other_bytes = 0;
  ASSERT_EQ(kvmix_cuda_record_bytes(&rows, &open_bytes), KVMIX_OK);
  ASSERT_EQ(kvmix_cuda_record_bytes(&formats[0], &bytes), KVMIX_OK);
  ASSERT_EQ(kvmix_cuda_record_bytes(&formats[1], &other_bytes), KVMIX_OK);
  const size_t stride = (std::max(bytes, other_bytes) + 15) / 16 * 16;
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  std::vector<uint8_t> open(kPages * kHeads * open_bytes);
  std::vector<std::vector<uint16_t>> numbers;  // that open pages stand for, keys and values in turn
  for (size_t at = 0; at < kPages * kHeads; ++at) {
    std::vector<AlignedBytes> tiles;
    for (const bool key : {true, false}) {
      const Side side = key ? Side::kKey : Side::kValue;
      std::vector<uint16_t> x(kPageTokens * dim);
      for (uint16_t& h : x) h = f32_to_f16(normal(random) + 0.5f);
      const CodecSpec spec = spec_of(rows, key);
      std::vector<float> decoded(x.size());
      tiles.emplace_back(tile_bytes(spec, head_dim));
      encode_tile(spec, side, head_dim, x.data(), tiles.back().data());
      decode_tile(spec, side, head_dim, tiles.back().data(), decoded.data());
      std::transform(decoded.begin(), decoded.end(), x.begin(), f32_to_f16);
      numbers.push_back(x);
    }
    ASSERT_EQ(kvmix_cuda_record_from_tiles(&rows, tiles[0].data(), tiles[1].data(), open.data() + at * open_bytes), KVMIX_OK);
  }
  const std::vector<int32_t> open_ids = {0, 1, 1, 0};
  const std::vector<int32_t> record_ids[kLayers] = {{2, cuda::kNoRecord, 0, 1}, {5, 3, cuda::kNoRecord, 4}};
  DeviceBytes pages(open.size()), from(16), to(16), other_to(16), records(6 * kHeads * stride);
  pages.upload(open), from.upload(open_ids), to.upload(record_ids[0]), other_to.upload(record_ids[1]);
  ASSERT_CUDA(cudaMemset(records.data, 0xcd, 6 * kHeads * stride));
  cuda::SealJob jobs[kLayers];
  for (int layer = 0; layer < kLayers; ++layer) {
    kvmix_cuda_seal_params& p = jobs[layer].params;
    p = {};
    p.format = formats[layer], p.pages = kPages, p.kv_heads = kHeads;
    p.open_pages = pages.data, p.open_head_stride = static_cast<int64_t>(open_bytes);
    p.open_page_stride = kHeads * p.open_head_stride;
    p.records = records.data, p.record_head_stride = static_cast<int64_t>(stride);
    p.record_page_stride = kHeads * p.record_head_stride;
    p.open_ids = static_cast<int32_t*>(from.data);
    p.record_ids = static_cast<int32_t*>(layer == 0 ? to.data : other_to.data);
    jobs[layer].details.ids_of_heads = true;
    jobs[layer].details.open = {head_dim, 8, 8, 128, 128, true};
  }
  cuda::seal(jobs);
  ASSERT_CUDA(cudaDeviceSynchronize());
  std::vector<uint8_t> got(6 * kHeads * stride), want(got.size(), 0xcd);
  ASSERT_CUDA(cudaMemcpy(got.data(), records.data, got.size(), cudaMemcpyDeviceToHost));
  const TransformSpec none;
  const RowMapChain maps[2] = {{none, {Side::kKey, kHeads, head_dim}, "keys"},
                               {none, {Side::kValue, kHeads, head_dim}, "values"}};
  for (size_t layer = 0; layer < kLayers; ++layer) {
    for (size_t i = 0; i < kPages * kHeads; ++i) {
      if (record_ids[layer][i] == cuda::kNoRecord) continue;
      const size_t head = i % kHeads, page = static_cast<size_t>(open_ids[i]) * kHeads + head;
      const auto record = sealed_record(formats[layer], {}, maps, static_cast<int>(head), numbers[2 * page].data(),
                                        numbers[2 * page + 1].data());
      std::copy(record.begin(), record.end(),
                want.begin() + static_cast<ptrdiff_t>((static_cast<size_t>(record_ids[layer][i]) * kHeads + head) * stride));
    }
  }
  EXPECT_EQ(std::memcmp(want.data(), got.data(), got.size()), 0);
}

// Trellis codes on both sides, of all widths, and beside codes and fp16.
std::vector<kvmix_cuda_format> trellis_formats() {
  std::vector<kvmix_cuda_format> all;
  for (const int dim : {64, 96, 128, 256}) {
    for (const int k : {2, 3, 4, 5}) {
      for (const int v : {2, 3, 4, 5}) all.push_back({dim, cuda::kTrellis + k, cuda::kTrellis + v, 128, 128, 0});
    }
    all.push_back({dim, cuda::kTrellis + 2, 3, 128, 64, 0});
    all.push_back({dim, cuda::kTrellis + 3, 16, 128, 128, 0});
    all.push_back({dim, 4, cuda::kTrellis + 2, 32, 128, 0});
    all.push_back({dim, 2, cuda::kTrellis + 4, 128, 128, 1});
    all.push_back({dim, 16, cuda::kTrellis + 5, 128, 128, 0});
  }
  return all;
}

// A captured launch replays to the same bits; the second launch of World::run checks repetition.
TEST_P(CudaAttend, Graph) {
  World world({GetParam(), 4, 2, 1, 0, 64, 0, 64, 0.0f, {700, 1111}});
  std::vector<uint16_t> direct, replayed;
  std::vector<float> lse;
  world.run(&direct, &lse);
  world.run(&replayed, &lse, true);
  EXPECT_EQ(direct, replayed);
}

TEST(CudaAppend, WritesRowsOfBothTypes) {
  if (!has_gpu()) GTEST_SKIP() << "NO GPU: the CUDA kernels were not run";
  constexpr size_t kAppendRows = 5, kHeads = 3, kDim = 96, kPages = 2;
  constexpr size_t kSide = kPageTokens * kDim, kPage = kHeads * 2 * kSide;
  const std::vector<int64_t> slots = {0, 127, 128, -1, 200};
  for (const bool bf16 : {false, true}) {
    std::vector<uint16_t> keys(kAppendRows * kHeads * kDim), values(keys.size()), pages(kPages * kPage, 0x1234);
    for (size_t i = 0; i < keys.size(); ++i) {
      const float x = static_cast<float>(i % 255) - 127.0f;
      keys[i] = bf16 ? to_bf16(x) : f32_to_f16(x), values[i] = bf16 ? to_bf16(-x) : f32_to_f16(-x);
    }
    if (bf16) keys[0] = to_bf16(131072.0f);
    DeviceBytes k(keys.size() * 2), v(keys.size() * 2), open(pages.size() * 2), to(slots.size() * 8);
    k.upload(keys), v.upload(values), open.upload(pages), to.upload(slots);
    kvmix_cuda_append_params p{};
    p.rows = kAppendRows, p.kv_heads = kHeads, p.head_dim = kDim, p.bf16 = bf16;
    p.keys = k.data, p.values = v.data, p.row_stride = kHeads * kDim * 2, p.head_stride = kDim * 2;
    p.open_pages = open.data, p.open_page_stride = kPage * 2, p.open_head_stride = 2 * kSide * 2;
    p.slots = static_cast<int64_t*>(to.data);
    ASSERT_EQ(kvmix_cuda_append(&p), KVMIX_OK) << kvmix_cuda_last_error();
    ASSERT_CUDA(cudaDeviceSynchronize());
    std::vector<uint16_t> want = pages, got(pages.size());
    for (size_t row = 0; row < kAppendRows; ++row) {
      if (slots[row] < 0) continue;
      const size_t page = static_cast<size_t>(slots[row]) / kPageTokens, slot = static_cast<size_t>(slots[row]) % kPageTokens;
      for (size_t h = 0; h < kHeads; ++h) {
        for (size_t c = 0; c < kDim; ++c) {
          const size_t from = (row * kHeads + h) * kDim + c, at = page * kPage + h * 2 * kSide + slot * kDim + c;
          const auto half = [&](uint16_t x) { return bf16 ? f32_to_f16(std::min(from_bf16(x), 65504.0f)) : x; };
          want[at] = half(keys[from]), want[at + kSide] = half(values[from]);
        }
      }
    }
    ASSERT_CUDA(cudaMemcpy(got.data(), open.data, got.size() * 2, cudaMemcpyDeviceToHost));
    EXPECT_EQ(got, want) << "bf16 " << bf16;
  }
}

TEST(CudaShapes, NamesTheKernelOrRefuses) {
  kvmix_cuda_attend_params p{};
  p.sequences = 1, p.q_heads = 8, p.kv_heads = 2, p.q_tokens = 1;
  p.format = {128, 2, 2, 128, 128, 0};
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "codes-4");
  p.q_tokens = 2;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "codes-8");
  p.q_tokens = 3;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "codes-16");
  p.format.key_per_token = 1;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "pages-16");
  p.q_tokens = 5;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "pages-64");
  p.format.key_per_token = 0;
  p.q_tokens = 500;
  const std::string prefill = kvmix_cuda_attend_kernel(&p);
  EXPECT_TRUE(prefill == "pages-64" || prefill == "prefill-128") << prefill;
  p.q_tokens = 1;
  EXPECT_LT(kvmix_cuda_attend_cost(&p), 0.25f);
  p.format.value_bits = KVMIX_CUDA_TRELLIS + 2;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "trellis-4");
  EXPECT_GT(kvmix_cuda_attend_cost(&p), 0.4f);
  EXPECT_LT(kvmix_cuda_attend_cost(&p), 0.5f);
  p.format.value_bits = 8;
  EXPECT_GT(kvmix_cuda_attend_cost(&p), 0.3f);
  p.format.value_bits = 16;
  EXPECT_GE(kvmix_cuda_attend_cost(&p), 1.0f);
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "pages-16");
  p.format.key_bits = 16;
  EXPECT_EQ(kvmix_cuda_attend_cost(&p), 1.0f);
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "fp16-4");
  p.q_tokens = 4;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "fp16-16");
  p.q_tokens = 5;
  EXPECT_STREQ(kvmix_cuda_attend_kernel(&p), "pages-64");
  for (const kvmix_cuda_format& f : {kvmix_cuda_format{80, 2, 2, 128, 128, 0}, kvmix_cuda_format{128, 5, 2, 128, 128, 0},
                                     kvmix_cuda_format{128, 2, 2, 16, 128, 0}}) {
    p.format = f;
    EXPECT_EQ(kvmix_cuda_attend_kernel(&p), nullptr);
    EXPECT_LT(kvmix_cuda_attend_cost(&p), 0.0f);
    EXPECT_NE(std::string(kvmix_cuda_last_error()).find("there are widths 1, 2, 3, 4, 8, 16"), std::string::npos);
  }
}

std::string name_of(const ::testing::TestParamInfo<kvmix_cuda_format>& entry) {
  const kvmix_cuda_format& f = entry.param;
  const auto width = [](int bits) {
    return std::string(bits > cuda::kTrellis ? "t" : "").append(std::to_string(bits % cuda::kTrellis));
  };
  return std::string("d") + std::to_string(f.head_dim) + "k" + width(f.key_bits) + "v" + width(f.value_bits) + "g" +
         std::to_string(f.key_group) + "g" + std::to_string(f.value_group) + (f.key_per_token != 0 ? "token" : "");
}
INSTANTIATE_TEST_SUITE_P(AllFormats, CudaAttend, ::testing::ValuesIn(formats()), name_of);
INSTANTIATE_TEST_SUITE_P(Trellis, CudaSealTrellis, ::testing::ValuesIn(trellis_formats()), name_of);
INSTANTIATE_TEST_SUITE_P(EveryHeadDim, CudaPrefill,
                         ::testing::Values(kvmix_cuda_format{64, 3, 8, 32, 64, 0}, kvmix_cuda_format{96, 2, 4, 64, 32, 0},
                                           kvmix_cuda_format{128, 2, 2, 128, 128, 0}, kvmix_cuda_format{128, 4, 3, 64, 32, 1},
                                           kvmix_cuda_format{256, 1, 16, 128, 128, 0},
                                           kvmix_cuda_format{64, cuda::kTrellis + 5, cuda::kTrellis + 2, 128, 128, 0},
                                           kvmix_cuda_format{96, cuda::kTrellis + 3, cuda::kTrellis + 4, 128, 128, 0},
                                           kvmix_cuda_format{128, cuda::kTrellis + 2, cuda::kTrellis + 3, 128, 128, 0},
                                           kvmix_cuda_format{128, cuda::kTrellis + 4, 2, 128, 32, 0},
                                           kvmix_cuda_format{128, 16, cuda::kTrellis + 5, 128, 128, 0},
                                           kvmix_cuda_format{256, cuda::kTrellis + 5, cuda::kTrellis + 5, 128, 128, 0},
                                           kvmix_cuda_format{256, cuda::kTrellis + 2, cuda::kTrellis + 4, 128, 128, 0},
                                           kvmix_cuda_format{256, 3, cuda::kTrellis + 3, 64, 128, 0}),
                         name_of);

}  // namespace
}  // namespace kvmix
