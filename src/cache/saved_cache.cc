// Saved caches (docs/file-formats.md): header, per layer its shape and codecs, then records head by head, then a checksum.
#include <algorithm>
#include <cstring>

#include "base/checksum.h"
#include "base/file.h"
#include "cache/state.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr char kMagic[8] = {'K', 'V', 'M', 'I', 'X', 'S', 'E', 'Q'};
constexpr uint32_t kVersion = 2;
constexpr size_t kLongestText = 4096;
constexpr size_t kLargestFile = size_t{1} << 40;

class Writer {
 public:
  explicit Writer(const std::string& path) : file_(path) {}
  void bytes(const void* data, size_t n) {
    checksum_.update(data, n);
    file_.write(data, n);
  }
  void finish() {
    const uint64_t sum = checksum_.value();
    file_.write(&sum, sizeof sum);
    file_.commit();
  }

 private:
  AtomicFile file_;
  Checksum checksum_;
};

class Reader {
 public:
  Reader(const std::string& path, const std::string& content) : path_(path), data_(content.data()), left_(content.size()) {}
  const char* bytes(size_t n, const char* what) {
    if (n > left_) fail(std::string("it ends inside ") + what);
    const char* at = data_;
    data_ += n;
    left_ -= n;
    return at;
  }
  template <typename T>
  T number(const char* what) {
    T value;
    std::memcpy(&value, bytes(sizeof value, what), sizeof value);
    return value;
  }
  std::string text(const char* what) {
    const auto n = number<uint32_t>(what);
    if (n > kLongestText) fail(std::string(what) + " has the impossible length " + std::to_string(n));
    return std::string(bytes(n, what), n);
  }
  size_t left() const { return left_; }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(Status::kCorrupt, path_ + ": damaged saved cache: " + what + "; save it again");
  }

 private:
  const std::string& path_;
  const char* data_;
  size_t left_;
};

struct SavedLayer {
  int32_t kv_heads, head_dim, sinks;
  int64_t sealed, freed;
  std::string key, value, recent;
};

struct Header {
  std::string fingerprint;
  int64_t tokens;
  std::vector<SavedLayer> layers;
};

// Reads over the header of a file whose checksum holds.
Header read_header(Reader& in) {
  Header header;
  header.fingerprint = in.text("the fingerprint");
  header.tokens = in.number<int64_t>("the token count");
  const auto layers = in.number<uint32_t>("the layer count");
  if (header.tokens < 0 || header.tokens > INT32_MAX) in.fail("token count " + std::to_string(header.tokens));
  if (layers == 0 || layers > 65536) in.fail("layer count " + std::to_string(layers));
  for (uint32_t l = 0; l < layers; ++l) {
    SavedLayer layer{};
    layer.kv_heads = in.number<int32_t>("a layer");
    layer.head_dim = in.number<int32_t>("a layer");
    layer.sinks = in.number<int32_t>("a layer");
    layer.sealed = in.number<int64_t>("a layer");
    layer.freed = in.number<int64_t>("a layer");
    layer.key = in.text("a codec");
    layer.value = in.text("a codec");
    layer.recent = in.text("a codec");
    header.layers.push_back(std::move(layer));
  }
  return header;
}

// Magic, version and checksum; what is left to read is then as it was written.
Reader open_saved(const std::string& path, const std::string& content) {
  Reader in(path, content);
  if (content.size() < sizeof kMagic || std::memcmp(content.data(), kMagic, sizeof kMagic) != 0) {
    throw Error(Status::kCorrupt, path + " is not a saved cache; give a file that a cache was saved to");
  }
  in.bytes(sizeof kMagic, "the magic");
  const auto version = in.number<uint32_t>("the version");
  if (version != kVersion) {
    throw Error(Status::kUnsupported, path + ": saved cache of version " + std::to_string(version) + "; this build reads " +
                                          std::to_string(kVersion));
  }
  if (content.size() < sizeof kMagic + sizeof kVersion + sizeof(uint64_t)) in.fail("it ends inside the header");
  Checksum sum;
  sum.update(content.data(), sizeof kMagic);
  sum.update(content.data() + sizeof kMagic, content.size() - sizeof kMagic - sizeof(uint64_t));
  uint64_t stored;
  std::memcpy(&stored, content.data() + content.size() - sizeof stored, sizeof stored);
  if (stored != sum.value()) in.fail("its checksum does not match");
  return in;
}

struct PageCounts {
  int64_t sealed, freed;
};

}  // namespace

void Cache::save(SequenceId id, const std::string& path, const std::string& fingerprint) const {
  const Impl& impl = *impl_;
  const SequencePages& sequence = impl.ledger.find(id);
  if (impl.ledger.is_open()) throw Error(Status::kInvalidArgument, "a sequence cannot be saved inside a step; end it first");
  if (fingerprint.size() > kLongestText)
    throw Error(Status::kInvalidArgument, "the fingerprint of a saved cache is at most 4096 bytes");
  // Of the pages behind the sinks: those sealed and those that left a sliding window, the latter counted among both.
  const auto count_pages = [&](size_t l) {
    PageCounts counts{0, 0};
    bool first = true;
    for (const PageEntry& entry : sequence.layers[l].heads[0].pages) {
      if (entry.format == impl.ids[l].sinks) continue;
      if (first) counts.freed = counts.sealed = (entry.first - impl.config.layers[l].sinks) / kPageTokens;
      first = false;
      if (impl.format(entry).role == PageRole::kSealed) ++counts.sealed;
    }
    return counts;
  };
  Writer out(path);
  // The body is summed as one stream, so it is collected as one write per record.
  out.bytes(kMagic, sizeof kMagic);
  std::string body;
  const auto add = [&](const void* data, size_t n) { body.append(static_cast<const char*>(data), n); };
  const auto number = [&](auto value) { add(&value, sizeof value); };
  const auto text = [&](const std::string& s) {
    number(static_cast<uint32_t>(s.size()));
    add(s.data(), s.size());
  };
  number(kVersion);
  text(fingerprint);
  number(sequence.length);
  number(static_cast<uint32_t>(sequence.layers.size()));
  for (size_t l = 0; l < sequence.layers.size(); ++l) {
    const LayerConfig& layer = impl.config.layers[l];
    number(static_cast<int32_t>(layer.kv_heads));
    number(static_cast<int32_t>(layer.head_dim));
    number(static_cast<int32_t>(layer.sinks));
    const PageCounts counts = count_pages(l);
    number(counts.sealed);
    number(counts.freed);
    text(to_string(layer.key.codec));
    text(to_string(layer.value.codec));
    text(to_string(layer.recent));
  }
  for (const LayerPages& layer : sequence.layers) {
    for (const PageList& list : layer.heads) {
      for (const PageEntry& entry : list.pages) impl.backend->save(entry, body);
    }
  }
  out.bytes(body.data(), body.size());
  out.finish();
}

SequenceId Cache::load(const std::string& path, const std::string& fingerprint) {
  Impl& impl = *impl_;
  if (impl.ledger.is_open()) throw Error(Status::kInvalidArgument, "a sequence cannot be loaded inside a step; end it first");
  const std::string content = read_file(path, kLargestFile);
  Reader in = open_saved(path, content);
  const Header header = read_header(in);
  if (header.fingerprint != fingerprint) {
    throw Error(Status::kMismatch, path + " was saved with another model or plan (" + header.fingerprint + ", now " +
                                       fingerprint + "); use those, or fill the cache anew");
  }
  if (header.layers.size() != impl.config.layers.size()) {
    throw Error(Status::kMismatch, path + " has " + std::to_string(header.layers.size()) + " layers, this cache " +
                                       std::to_string(impl.config.layers.size()));
  }
  for (size_t l = 0; l < header.layers.size(); ++l) {
    const SavedLayer& saved = header.layers[l];
    const LayerConfig& layer = impl.config.layers[l];
    const std::string where = "layer " + std::to_string(l);
    if (saved.kv_heads != layer.kv_heads || saved.head_dim != layer.head_dim || saved.sinks != layer.sinks ||
        saved.key != to_string(layer.key.codec) || saved.value != to_string(layer.value.codec) ||
        saved.recent != to_string(layer.recent)) {
      throw Error(Status::kMismatch,
                  path + ": " + where + " has another shape or codec than this cache; use the plan it was saved with");
    }
    const int64_t full = header.tokens <= layer.sinks ? 0 : (header.tokens - layer.sinks) / kPageTokens;
    if (saved.sealed < 0 || saved.sealed > full || saved.freed < 0 || saved.freed > saved.sealed ||
        saved.freed > predict_pages(layer, header.tokens).freed || (saved.sealed > saved.freed && !impl.ids[l].seals)) {
      in.fail(where + " says " + std::to_string(saved.sealed) + " sealed and " + std::to_string(saved.freed) + " freed pages");
    }
  }
  // The page lists that the header means; the records must be exactly what is left, before anything is allocated.
  std::vector<std::vector<PageEntry>> lists;
  size_t expected = sizeof(uint64_t);
  for (size_t l = 0; l < header.layers.size(); ++l) {
    const LayerConfig& layer = impl.config.layers[l];
    std::vector<PageEntry>& list = lists.emplace_back();
    const auto add = [&](FormatId format, int64_t first) {
      const auto live = static_cast<int32_t>(std::min<int64_t>(header.tokens - first, impl.formats[format].slots));
      list.push_back({kNoPage, format, static_cast<int32_t>(first), live});
      expected += static_cast<size_t>(layer.kv_heads) * impl.backend->saved_bytes(impl.formats[format], live);
    };
    if (layer.sinks > 0 && header.tokens > 0) add(impl.ids[l].sinks, 0);
    for (int64_t p = header.layers[l].freed; p < page_count(layer, header.tokens); ++p) {
      add(p < header.layers[l].sealed ? impl.ids[l].sealed : impl.ids[l].recent, layer.sinks + p * kPageTokens);
    }
  }
  if (expected != in.left())
    in.fail("its records take " + std::to_string(in.left()) + " bytes instead of " + std::to_string(expected));

  const SequenceId id = create();
  SequencePages& sequence = impl.ledger.find(id);
  try {
    for (size_t l = 0; l < header.layers.size(); ++l) {
      for (PageList& list : sequence.layers[l].heads) {
        list.pages.reserve(list_room(impl.config.layers[l], header.tokens));
        for (PageEntry entry : lists[l]) {
          const PageFormat& format = impl.format(entry);
          entry.handle = impl.backend->allocate(format);
          list.pages.push_back(entry);
          impl.backend->load(entry, in.bytes(impl.backend->saved_bytes(format, entry.live), "a page"));
        }
      }
    }
  } catch (...) {
    remove(id);
    throw;
  }
  sequence.length = header.tokens;
  return id;
}

SavedCacheInfo inspect_saved_cache(const std::string& path) {
  const std::string content = read_file(path, kLargestFile);
  Reader in = open_saved(path, content);
  const Header header = read_header(in);
  SavedCacheInfo info{};
  info.version = static_cast<int>(kVersion);
  info.fingerprint = header.fingerprint;
  info.tokens = header.tokens;
  info.layers = static_cast<int>(header.layers.size());
  info.file_bytes = content.size();
  for (const SavedLayer& layer : header.layers) {
    info.key_codecs.push_back(layer.key);
    info.value_codecs.push_back(layer.value);
  }
  return info;
}

}  // namespace kvmix
