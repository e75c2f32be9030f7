// The CUDA kernels' work list and C ABI. No device code: it is built, tested and answers without CUDA too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <span>
#include <vector>

#include "attention/cuda/support.h"
#include "codec/cuda/record.h"

namespace kvmix::cuda {
namespace {

thread_local std::string last_error;

constexpr kvmix_cuda_format kFormats[] = {
#define KVMIX_ATTEND(dim, k, v, kg, vg) {dim, k, v, kg, vg, 0},
#include "attention/cuda/attend_formats.inc"
#undef KVMIX_ATTEND
};

constexpr int kPagesAtOnce = 4;
constexpr int64_t kSparingBytes = 256 << 20;  // launches that read less spare what the L2 holds

int query_rows(const kvmix_cuda_attend_params& p) { return p.q_tokens * (p.q_heads / p.kv_heads); }

int page_count(const kvmix_cuda_attend_params& p, int length) {
  if (p.sinks == 0) return (length + kPageTokens - 1) / kPageTokens;
  return length == 0 ? 0 : 1 + (std::max(length - p.sinks, 0) + kPageTokens - 1) / kPageTokens;
}

// First page that the oldest query row of the sequence sees.
int first_page(const kvmix_cuda_attend_params& p, int length) {
  if (p.sliding_window == 0) return 0;
  const int first = std::max(length - p.q_tokens + 1 - p.sliding_window, 0);
  if (p.sinks == 0) return first / kPageTokens;
  return first < p.sinks ? 0 : 1 + (first - p.sinks) / kPageTokens;
}

std::vector<kvmix_cuda_item> make_plan(const kvmix_cuda_attend_params& p, std::span<const int32_t> lengths,
                                       const Residency& device) {
  struct Run {
    int begin, end;
  };
  std::vector<Run> runs;
  int64_t pages = 0;
  int longest = 1;
  for (const int32_t length : lengths) {
    if (length < 0) throw Error(Status::kInvalidArgument, "plan: length " + std::to_string(length) + " is negative");
    runs.push_back({first_page(p, length), page_count(p, length)});
    const int count = runs.back().end - runs.back().begin;
    pages += static_cast<int64_t>(count) * p.kv_heads;
    longest = std::max(longest, count);
  }
  // The chunk with the smallest estimated time, in us on an H100: waves x (turns of a warp, a page each, + beginning and end of
  // a block) + the sum over splits. A turn takes as long as the memory for the pages of all warps of a multiprocessor, or as
  // the arithmetic of one warp. The page kernel takes a page a block, arithmetic alone.
  constexpr double kRate = 25e3, kTurn = 2.5, kPageTurn = 8.0, kPageShare = 3.5;  // bytes and us of a multiprocessor
  constexpr double kBlock = 2.5, kBlockWarp = 0.125, kSum = 1.8, kSumSplit = 0.07;
  const bool fast = uses_fast_kernel(p);
  const double size = p.format.head_dim > 128 ? 2.0 : 1.0;
  int chunk = longest;
  double best = -1.0;
  const int most = query_rows(p) > kTileRows ? 1 : kMaxSplits;
  for (int splits = 1; splits <= std::min(longest, most); ++splits) {
    int candidate = (longest + splits - 1) / splits;
    if (fast && candidate > kPagesAtOnce) candidate = (candidate + kPagesAtOnce - 1) / kPagesAtOnce * kPagesAtOnce;
    int64_t blocks = 0;
    for (const Run& r : runs) blocks += static_cast<int64_t>((r.end - r.begin + candidate - 1) / candidate) * p.kv_heads;
    blocks = std::max<int64_t>(blocks, 1);
    const int warps = fast ? device.block_warps(blocks) : 1;
    const int resident = std::max(1, device.warps(blocks) / warps);  // blocks of a multiprocessor
    const double waves = std::max(1.0, static_cast<double>(blocks) / (static_cast<double>(device.processors) * resident));
    const double full = waves <= 4.0 ? std::ceil(waves) : waves + 0.5;
    const int busy = std::min(device.each(blocks), resident) * std::min(warps, candidate);
    const double turn = fast ? std::max(kTurn * size, busy * static_cast<double>(record_shape(p.format).bytes()) / kRate)
                             : std::max(kPageTurn, busy * kPageShare) * size;
    const double turns = (candidate + warps - 1) / warps;
    const double time = full * (turns * turn + kBlock + kBlockWarp * busy) + (splits > 1 ? kSum + kSumSplit * splits : 0.0);
    if (best < 0.0 || time < best) best = time, chunk = candidate;
  }
  // What is little beside the L2 shall leave it as it was.
  const int64_t bytes = fast ? pages * record_shape(p.format).bytes() : 0;
  std::vector<kvmix_cuda_item> items;
  const bool images = uses_images(p);
  int ticket = 0, image = 0;
  for (size_t sequence = 0; sequence < runs.size(); ++sequence) {
    const Run& r = runs[sequence];
    // An empty sequence still gets a block, which writes zeros and -inf.
    const int splits = std::max(1, (r.end - r.begin + chunk - 1) / chunk);
    for (int head = 0; head < p.kv_heads; ++head) {
      const int partial = static_cast<int>(items.size());
      for (int split = 0; split < splits; ++split) {
        kvmix_cuda_item item{};
        item.sequence = static_cast<int32_t>(sequence), item.kv_head = head;
        item.page_begin = r.begin + split * chunk;
        item.page_end = std::min(item.page_begin + chunk, r.end);
        item.split = split, item.splits = splits, item.partial = partial, item.ticket = ticket;
        item.length = lengths[sequence];
        if (images) item.partial = image, image += item.page_end - item.page_begin;
        item.evict_first = bytes <= kSparingBytes;
        items.push_back(item);
      }
      ++ticket;
    }
  }
  return items;
}

// Of a device that holds `slots` thread blocks.
Residency residency_of_slots(const kvmix_cuda_attend_params& p, int slots) {
  const int all = uses_fast_kernel(p) ? kPagesAtOnce : 1;
  return {slots, 0, all, all};
}

void require(bool ok, const std::string& message) {
  if (!ok) throw Error(Status::kInvalidArgument, message);
}

template <class Body>
kvmix_status guarded(const Body& body) {
  try {
    body();
    return KVMIX_OK;
  } catch (const Error& e) {
    last_error = e.what();
    return static_cast<kvmix_status>(e.status());
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return KVMIX_OUT_OF_MEMORY;
  }
}

}  // namespace

std::string format_name(const kvmix_cuda_format& f) {
  char text[160];
  std::snprintf(text, sizeof text, "int%d.%s.g%d keys, int%d.token.g%d values, head_dim %d", f.key_bits,
                f.key_per_token != 0 ? "token" : "channel", f.key_group, f.value_bits, f.value_group, f.head_dim);
  return text;
}

void check_format(const kvmix_cuda_format& f) {
  const auto one_of = [](int32_t v, std::initializer_list<int32_t> list) {
    return std::find(list.begin(), list.end(), v) != list.end();
  };
  const auto width = [&](int32_t bits) { return one_of(bits, {1, 2, 3, 4, 8, 16}); };
  const auto group = [&](int32_t g, int32_t bits) { return bits == 16 || one_of(g, {32, 64, 128}); };
  if (!one_of(f.head_dim, {64, 96, 128, 256}) || !width(f.key_bits) || !width(f.value_bits) ||
      !group(f.key_group, f.key_bits) || !group(f.value_group, f.value_bits)) {
    throw Error(Status::kUnsupported,
                "no CUDA kernel for " + format_name(f) +
                    "; there are widths 1, 2, 3, 4, 8, 16, groups 32, 64, 128, head_dim 64, 96, 128, 256");
  }
}

bool uses_fast_kernel(const kvmix_cuda_attend_params& p) {
  const kvmix_cuda_format& f = p.format;
  const auto same = [&](const kvmix_cuda_format& other) {
    return f.head_dim == other.head_dim && f.key_bits == other.key_bits && f.value_bits == other.value_bits &&
           f.key_group == other.key_group && f.value_group == other.value_group && f.key_per_token == 0;
  };
  return query_rows(p) <= 8 && std::any_of(std::begin(kFormats), std::end(kFormats), same);
}

bool uses_images(const kvmix_cuda_attend_params& p) {
  constexpr int kFewestRows = 512;  // fewer are faster when each tile dequantises
  return query_rows(p) >= kFewestRows && has_prefill_kernel();
}

void check_shape(const kvmix_cuda_attend_params& p) {
  check_format(p.format);
  require(p.sequences > 0 && p.kv_heads > 0 && p.q_heads > 0 && p.q_heads % p.kv_heads == 0,
          "attend: q_heads " + std::to_string(p.q_heads) + " must be a multiple of kv_heads " + std::to_string(p.kv_heads));
  require(p.q_tokens > 0 && p.q_tokens <= 65536 && query_rows(p) <= 65535 * kTileRows,
          "attend: q_tokens " + std::to_string(p.q_tokens) + " not in 1..65536");
  require(p.sinks >= 0 && p.sinks <= kPageTokens, "attend: sinks " + std::to_string(p.sinks) + " not in 0..128");
  require(p.sliding_window >= 0 && p.softcap >= 0.0f && p.scale >= 0.0f, "attend: negative sliding_window, softcap or scale");
  require((p.new_keys == nullptr) == (p.new_values == nullptr), "attend: new_keys and new_values come together");
  require(p.new_keys == nullptr || query_rows(p) <= kTileRows,
          "attend: new rows are taken with at most 64 query rows a KV head; append them first");
}

WorkspaceLayout workspace_layout(const kvmix_cuda_attend_params& p) {
  const size_t tickets = static_cast<size_t>(p.sequences) * static_cast<size_t>(p.kv_heads) * sizeof(int32_t);
  const auto rows = static_cast<size_t>(query_rows(p) > kTileRows ? 0 : query_rows(p));
  return {(tickets + 255) / 256 * 256, (rows * 2 * sizeof(float) + 15) / 16 * 16,
          rows * sizeof(float) * static_cast<size_t>(p.format.head_dim)};
}

#ifndef KVMIX_CUDA
namespace {
[[noreturn]] void no_cuda() {
  throw Error(Status::kUnsupported, "CUDA is not available in this build; configure with -DKVMIX_CUDA=ON");
}
}  // namespace
void attend(const kvmix_cuda_attend_params&) { no_cuda(); }
void seal(const kvmix_cuda_seal_params&) { no_cuda(); }
void append(const kvmix_cuda_append_params&) { no_cuda(); }
Residency residency(const kvmix_cuda_attend_params&) { no_cuda(); }
bool has_prefill_kernel() { return false; }
#endif

}  // namespace kvmix::cuda

using namespace kvmix;
using namespace kvmix::cuda;

extern "C" {

kvmix_status kvmix_cuda_record_bytes(const kvmix_cuda_format* format, size_t* bytes) {
  return guarded([&] {
    require(format != nullptr && bytes != nullptr, "record_bytes: null argument");
    check_format(*format);
    *bytes = static_cast<size_t>(record_shape(*format).bytes());
  });
}

kvmix_status kvmix_cuda_record_from_tiles(const kvmix_cuda_format* format, const void* key_tile, const void* value_tile,
                                          void* record) {
  return guarded([&] {
    require(format != nullptr && key_tile != nullptr && value_tile != nullptr && record != nullptr,
            "record_from_tiles: null argument");
    check_format(*format);
    record_from_tiles(record_shape(*format), static_cast<const uint8_t*>(key_tile), static_cast<const uint8_t*>(value_tile),
                      static_cast<uint8_t*>(record));
  });
}

kvmix_status kvmix_cuda_tiles_from_record(const kvmix_cuda_format* format, const void* record, void* key_tile,
                                          void* value_tile) {
  return guarded([&] {
    require(format != nullptr && key_tile != nullptr && value_tile != nullptr && record != nullptr,
            "tiles_from_record: null argument");
    check_format(*format);
    tiles_from_record(record_shape(*format), static_cast<const uint8_t*>(record), static_cast<uint8_t*>(key_tile),
                      static_cast<uint8_t*>(value_tile));
  });
}

kvmix_status kvmix_cuda_plan(const kvmix_cuda_attend_params* params, const int32_t* lengths, int32_t slots,
                             kvmix_cuda_item* items, int32_t capacity, int32_t* item_count, size_t* workspace_bytes) {
  return guarded([&] {
    require(params != nullptr && lengths != nullptr && item_count != nullptr && workspace_bytes != nullptr,
            "plan: null argument");
    check_shape(*params);
    const std::vector<kvmix_cuda_item> planned = make_plan(*params, {lengths, static_cast<size_t>(params->sequences)},
                                                           slots > 0 ? residency_of_slots(*params, slots) : residency(*params));
    const auto count = static_cast<int32_t>(planned.size());
    if (items != nullptr) {
      require(capacity >= count,
              "plan: " + std::to_string(count) + " items do not fit a capacity of " + std::to_string(capacity));
      std::copy(planned.begin(), planned.end(), items);
    }
    *item_count = count;
    *workspace_bytes = workspace_layout(*params).bytes(count);
    if (uses_images(*params)) {
      for (const kvmix_cuda_item& item : planned) {
        *workspace_bytes += static_cast<size_t>(item.page_end - item.page_begin) *
                            static_cast<size_t>(page_image_bytes(params->format.head_dim));
      }
    }
  });
}

kvmix_status kvmix_cuda_attend(const kvmix_cuda_attend_params* params) {
  return guarded([&] {
    require(params != nullptr, "attend: null argument");
    attend(*params);
  });
}

kvmix_status kvmix_cuda_seal(const kvmix_cuda_seal_params* params) {
  return guarded([&] {
    require(params != nullptr, "seal: null argument");
    check_format(params->format);
    require(params->pages >= 0 && params->kv_heads > 0 && params->kv_heads <= 65535, "seal: pages or kv_heads out of range");
    for (const kvmix_cuda_transform* t : {&params->key_transform, &params->value_transform}) {
      require(t->scales == nullptr || t->hadamard != 0, "seal: scales belong to a Hadamard transform");
    }
    require(params->value_transform.center == nullptr, "seal: centring is for keys only");
    if (params->pages > 0) seal(*params);
  });
}

kvmix_status kvmix_cuda_append(const kvmix_cuda_append_params* params) {
  return guarded([&] {
    require(params != nullptr, "append: null argument");
    require(params->rows >= 0 && params->kv_heads > 0 && params->kv_heads <= 65535, "append: rows or kv_heads out of range");
    require(params->head_dim > 0 && params->head_dim % 8 == 0 && params->head_dim <= 1024,
            "append: head_dim " + std::to_string(params->head_dim) + " is not a multiple of 8 up to 1024");
    if (params->rows > 0) append(*params);
  });
}

const char* kvmix_cuda_attend_kernel(const kvmix_cuda_attend_params* params) {
  const char* name = nullptr;
  const kvmix_status status = guarded([&] {
    require(params != nullptr, "attend_kernel: null argument");
    check_shape(*params);
    const int rows = query_rows(*params);
    if (uses_fast_kernel(*params)) {
      name = rows <= 4 ? "codes-4" : "codes-8";
    } else if (rows <= 16) {
      name = "pages-16";
    } else {
      name = rows > kTileRows && has_prefill_kernel() ? "prefill-128" : "pages-64";
    }
  });
  return status == KVMIX_OK ? name : nullptr;
}

const char* kvmix_cuda_last_error(void) { return last_error.c_str(); }

}  // extern "C"
