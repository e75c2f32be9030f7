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
constexpr uint32_t kVersion = 2;       // page lists by formula
constexpr uint32_t kListsVersion = 3;  // page lists in full, of caches with a token policy
constexpr uint32_t kMassVersion = 4;   // and the mass of their tokens, those of a low tier in lists of their own
// Of caches with a channel policy: lists in full, with mass where a flag says so, and the channels of each.
constexpr uint32_t kChannelsVersion = 5;
constexpr uint8_t kThinRole = 3;  // in such a file, a sealed page of these channels
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
  uint32_t version = 0;
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

// A side's codec, and how many latents stand for its rows.
std::string stored_as(const LayerConfig& layer, Side side) {
  const bool key = side == Side::kKey;
  const std::string codec = to_string((key ? layer.key : layer.value).codec);
  return layer.latent() ? codec + " of rank " + std::to_string(key ? layer.key_rank : layer.value_rank) : codec;
}

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
  in.version = in.number<uint32_t>("the version");
  if (in.version < kVersion || in.version > kChannelsVersion) {
    throw Error(Status::kUnsupported, path + ": saved cache of version " + std::to_string(in.version) + "; this build reads " +
                                          std::to_string(kVersion) + " to " + std::to_string(kChannelsVersion));
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

struct SavedRole {
  PageRole role;
  bool thin;
};
SavedRole read_role(Reader& in) {
  const auto role = in.number<uint8_t>("a page list");
  const bool thin = in.version == kChannelsVersion && role == kThinRole;
  if (!thin && role > static_cast<uint8_t>(PageRole::kSealed)) {
    in.fail("a page is of the unknown role " + std::to_string(role));
  }
  return {thin ? PageRole::kSealed : static_cast<PageRole>(role), thin};
}

// A list's channels: none, or as many as pages hold, ascending, of the layer's.
std::vector<uint8_t> read_channels(Reader& in, size_t kept, int width) {
  const auto n = in.number<uint16_t>("channels");
  if (n != 0 && n != kept) in.fail("a head has chosen " + std::to_string(n) + " channels");
  std::vector<uint8_t> channels;
  channels.reserve(n);
  for (uint16_t i = 0; i < n; ++i) {
    const auto channel = in.number<uint8_t>("a channel");
    if (channel >= width || (i > 0 && channel <= channels.back()))
      in.fail("a head has chosen channel " + std::to_string(channel));
    channels.push_back(channel);
  }
  return channels;
}

// A head's list as version 3 writes it, checked as far as tokens go: ascending, below the length, `first` as it must be. Pages
// of a low tier are sealed ones, and name all positions.
PageList read_list(Reader& in, const LayerFormats& ids, const FormatTable& formats, int64_t tokens, bool low) {
  PageList list;
  const auto pages = in.number<uint32_t>("a page list");
  constexpr size_t kEntryBytes = sizeof(uint8_t) + 2 * sizeof(int32_t);
  if (pages > in.left() / kEntryBytes) in.fail("a head has " + std::to_string(pages) + " pages");
  for (uint32_t i = 0; i < pages; ++i) {
    const auto [role, thin] = read_role(in);
    const auto first = in.number<int32_t>("a page list"), live = in.number<int32_t>("a page list");
    if ((role == PageRole::kSinks && i > 0) || (role == PageRole::kSealed && !thin && !ids.seals && !low) ||
        (thin && !ids.thins) || (role != PageRole::kSealed && low)) {
      in.fail("a page is where none of its role can be");
    }
    const FormatId format = low                         ? ids.low
                            : thin                      ? ids.thin
                            : role == PageRole::kSinks  ? ids.sinks
                            : role == PageRole::kRecent ? ids.recent
                                                        : ids.sealed;
    if (live < 1 || live > formats[format].slots) in.fail("a page holds " + std::to_string(live) + " tokens");
    list.pages.push_back({kNoPage, format, first, live});
  }
  const auto listed = in.number<uint32_t>("a page list");
  if (listed > in.left() / sizeof(int32_t) || static_cast<int64_t>(listed) > list.tokens() ||
      (low && static_cast<int64_t>(listed) != list.tokens())) {
    in.fail("a head names " + std::to_string(listed) + " positions");
  }
  for (uint32_t i = 0; i < listed; ++i) list.positions.push_back(in.number<int32_t>("a position"));
  int64_t newest = -1, before = 0;
  for (const PageEntry& page : list.pages) {
    for (int slot = 0; slot < page.live; ++slot) {
      const int64_t position = list.position(page, before, slot);
      if (position <= newest || position >= tokens) in.fail("a token stands at position " + std::to_string(position));
      newest = position;
    }
    if (page.first != newest - page.live + 1) in.fail("a page begins at position " + std::to_string(page.first));
    before += page.live;
  }
  return list;
}

// The mass of a list's tokens.
void read_mass(Reader& in, PageList& list) {
  const auto tokens = static_cast<size_t>(list.tokens());
  if (tokens > in.left() / sizeof(float)) in.fail("it ends inside the mass of a head's tokens");
  list.mass.reserve(mass_room(list.tokens()));
  for (size_t i = 0; i < tokens; ++i) {
    const float mass = list.mass.emplace_back(in.number<float>("the mass of a token"));
    if (!(mass >= 0)) in.fail("a token has the mass " + std::to_string(mass));
  }
}

// No token stands in both tiers.
bool apart(const PageList& list, const PageList& low) {
  bool apart = true;
  size_t next = 0;
  list.for_each_token([&](const PageEntry&, int, int32_t position) {
    while (next < low.positions.size() && low.positions[next] < position) ++next;
    if (next < low.positions.size() && low.positions[next] == position) apart = false;
  });
  return apart;
}

// A sliding window frees the pages of all heads together and names no positions; other layers free none, and any layer ends
// with the newest token or says where it ends.
void check_window(const Reader& in, const LayerConfig& layer, bool governed, const PageList& first, const PageList& list,
                  int64_t tokens) {
  if (layer.sliding_window > 0 && (!list.positions.empty() || list.pages != first.pages)) {
    in.fail("heads of a layer with a sliding window differ");
  }
  if (!list.positions.empty() || (governed && list.pages.empty())) return;
  const int64_t end = list.pages.empty() ? 0 : list.pages.back().first + list.pages.back().live;
  if (end != tokens) in.fail("a head ends at position " + std::to_string(end) + " of " + std::to_string(tokens));
}

// What version 2 says of a layer: the list that each of its heads has.
PageList formula_list(const SavedLayer& saved, const LayerConfig& layer, const LayerFormats& ids, const FormatTable& formats,
                      int64_t tokens) {
  PageList list;
  const auto add = [&](FormatId format, int64_t first) {
    const auto live = static_cast<int32_t>(std::min<int64_t>(tokens - first, formats[format].slots));
    list.pages.push_back({kNoPage, format, static_cast<int32_t>(first), live});
  };
  if (layer.sinks > 0 && tokens > 0) add(ids.sinks, 0);
  for (int64_t p = saved.freed; p < page_count(layer, tokens); ++p) {
    add(p < saved.sealed ? ids.sealed : ids.recent, layer.sinks + p * kPageTokens);
  }
  return list;
}

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
  if (sequence.in_prompt && (impl.governed.policy != nullptr || impl.governed.channels != nullptr)) {
    throw Error(Status::kUnsupported, "sequence " + std::to_string(id) +
                                          " is inside a prompt whose end a policy waits for; "
                                          "save it when the prompt has ended");
  }
  const bool thins = impl.governed.channels != nullptr, lists = impl.governed.policy != nullptr || thins;
  const bool counted = impl.governed.policy != nullptr && impl.governed.policy->needs().mass != MassReduce::kNone;
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
  const bool low_tier = impl.governed.policy != nullptr && impl.governed.policy->has_low_tier();
  number(thins ? kChannelsVersion : counted || low_tier ? kMassVersion : lists ? kListsVersion : kVersion);
  text(fingerprint);
  number(sequence.length);
  number(static_cast<uint32_t>(sequence.layers.size()));
  for (size_t l = 0; l < sequence.layers.size(); ++l) {
    const LayerConfig& layer = impl.config.layers[l];
    number(static_cast<int32_t>(layer.lists()));
    number(static_cast<int32_t>(layer.head_dim));
    number(static_cast<int32_t>(layer.sinks));
    const PageCounts counts = lists ? PageCounts{0, 0} : count_pages(l);
    number(counts.sealed);
    number(counts.freed);
    text(stored_as(layer, Side::kKey));
    text(stored_as(layer, Side::kValue));
    text(to_string(layer.recent));
  }
  if (lists) number(sequence.prompt_length);
  if (thins) number(static_cast<uint8_t>(counted));
  if (counted) number(sequence.counted_from);
  for (size_t l = 0; l < sequence.layers.size() && lists; ++l) {
    sequence.layers[l].for_each_list([&](const PageList& list) {
      number(static_cast<uint32_t>(list.pages.size()));
      for (const PageEntry& page : list.pages) {
        const bool thin = impl.ids[l].thins && page.format == impl.ids[l].thin;
        number(thin ? kThinRole : static_cast<uint8_t>(impl.format(page).role));
        number(static_cast<int32_t>(page.first));
        number(static_cast<int32_t>(page.live));
      }
      number(static_cast<uint32_t>(list.positions.size()));
      for (const int32_t position : list.positions) number(position);
      if (impl.ids[l].thins) {
        number(static_cast<uint16_t>(list.channels.size()));
        add(list.channels.data(), list.channels.size());
      }
      if (!impl.ids[l].mass) return;
      for (int64_t i = 0; i < list.tokens(); ++i)
        number(static_cast<size_t>(i) < list.mass.size() ? list.mass[static_cast<size_t>(i)] : 0.0f);
    });
  }
  for (const LayerPages& layer : sequence.layers) {
    layer.for_each_list([&](const PageList& list) {
      for (const PageEntry& entry : list.pages) impl.backend->save(entry, body);
    });
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
    if (saved.kv_heads != layer.lists() || saved.head_dim != layer.head_dim || saved.sinks != layer.sinks ||
        saved.key != stored_as(layer, Side::kKey) || saved.value != stored_as(layer, Side::kValue) ||
        saved.recent != to_string(layer.recent)) {
      throw Error(Status::kMismatch,
                  path + ": " + where + " has another shape or codec than this cache; use the plan it was saved with");
    }
    if (in.version >= kListsVersion) {
      if (saved.sealed != 0 || saved.freed != 0) in.fail(where + " counts pages that are listed");
      continue;
    }
    const int64_t full = header.tokens <= layer.sinks ? 0 : (header.tokens - layer.sinks) / kPageTokens;
    if (saved.sealed < 0 || saved.sealed > full || saved.freed < 0 || saved.freed > saved.sealed ||
        saved.freed > predict_pages(layer, header.tokens).freed || (saved.sealed > saved.freed && !impl.ids[l].seals)) {
      in.fail(where + " says " + std::to_string(saved.sealed) + " sealed and " + std::to_string(saved.freed) + " freed pages");
    }
    // Every page takes at least a byte: lists are not made for more than the file can hold.
    if (page_count(layer, header.tokens) - saved.freed > static_cast<int64_t>(in.left()))
      in.fail("token count " + std::to_string(header.tokens) + " is more than it holds");
  }
  // The page lists; the records must be exactly what is left, before anything is allocated.
  const bool counted = impl.governed.policy != nullptr && impl.governed.policy->needs().mass != MassReduce::kNone;
  const bool low_tier = impl.governed.policy != nullptr && impl.governed.policy->has_low_tier();
  const bool thins = impl.governed.channels != nullptr;
  if ((in.version == kChannelsVersion) != thins) {
    throw Error(Status::kMismatch, path +
                                       (thins ? " lacks the channels that this cache's channel policy has chosen"
                                              : " was saved with a channel policy") +
                                       "; use the plan it was saved with");
  }
  if (!thins && (in.version == kMassVersion) != (counted || low_tier)) {
    throw Error(Status::kMismatch, path +
                                       (counted || low_tier ? " lacks what this cache's token policy has counted"
                                                            : " was saved by a token policy that counts attention") +
                                       "; use the plan it was saved with");
  }
  int64_t prompt_length = 0, counted_from = 0;
  if (in.version >= kListsVersion) {
    prompt_length = in.number<int64_t>("the prompt length");
    if (prompt_length < 0 || prompt_length > header.tokens) in.fail("prompt length " + std::to_string(prompt_length));
  }
  if (thins && in.number<uint8_t>("whether mass is counted") != static_cast<uint8_t>(counted)) {
    throw Error(Status::kMismatch, path + " was saved with another token policy; use the plan it was saved with");
  }
  if (counted) {
    counted_from = in.number<int64_t>("where mass is counted from");
    if (counted_from < 0 || counted_from > header.tokens) in.fail("mass counted from " + std::to_string(counted_from));
  }
  std::vector<LayerPages> layers(header.layers.size());
  size_t expected = sizeof(uint64_t);
  for (size_t l = 0; l < header.layers.size(); ++l) {
    const LayerConfig& layer = impl.config.layers[l];
    const auto read = [&](std::vector<PageList>& to, bool low) -> PageList& {
      PageList& list = to.emplace_back(read_list(in, impl.ids[l], impl.formats, header.tokens, low));
      if (impl.ids[l].thins) {
        list.channels = read_channels(in, static_cast<size_t>(impl.formats[impl.ids[l].thin].key.width), layer.head_dim);
        const bool holds = std::any_of(list.pages.begin(), list.pages.end(),
                                       [&](const PageEntry& page) { return page.format == impl.ids[l].thin; });
        if (holds && list.channels.empty()) in.fail("a page is of channels that its head does not name");
      }
      if (impl.ids[l].mass) read_mass(in, list);
      return list;
    };
    for (int h = 0; h < layer.lists(); ++h) {
      PageList& list =
          in.version >= kListsVersion
              ? read(layers[l].heads, false)
              : layers[l].heads.emplace_back(formula_list(header.layers[l], layer, impl.ids[l], impl.formats, header.tokens));
      check_window(in, layer, impl.ids[l].governed, layers[l].heads.front(), list, header.tokens);
    }
    for (int h = 0; h < layer.lists() && impl.ids[l].low_tier; ++h) {
      const PageList& low = read(layers[l].low, true);
      if (!apart(layers[l].heads[static_cast<size_t>(h)], low)) in.fail("a token stands in two tiers");
    }
    layers[l].for_each_list([&](const PageList& list) {
      for (const PageEntry& page : list.pages) expected += impl.backend->saved_bytes(impl.format(page), page.live);
    });
  }
  if (expected != in.left())
    in.fail("its records take " + std::to_string(in.left()) + " bytes instead of " + std::to_string(expected));

  const SequenceId id = create();
  SequencePages& sequence = impl.ledger.find(id);
  try {
    for (size_t l = 0; l < header.layers.size(); ++l) {
      const size_t heads = layers[l].heads.size();
      for (size_t h = 0; h < heads + layers[l].low.size(); ++h) {
        PageList& list = h < heads ? sequence.layers[l].heads[h] : sequence.layers[l].low[h - heads];
        PageList& saved = h < heads ? layers[l].heads[h] : layers[l].low[h - heads];
        const int64_t tokens = saved.positions.empty() ? header.tokens : saved.tokens();
        list.pages.reserve(std::max(h < heads ? list_room(impl.config.layers[l], tokens) : 0, table_room(saved.pages.size())));
        list.positions = saved.positions;
        list.mass = std::move(saved.mass);
        list.channels = std::move(saved.channels);
        for (PageEntry entry : saved.pages) {
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
  sequence.prompt_length = prompt_length;
  sequence.counted_from = counted_from;
  return id;
}

SavedCacheInfo inspect_saved_cache(const std::string& path) {
  const std::string content = read_file(path, kLargestFile);
  Reader in = open_saved(path, content);
  const Header header = read_header(in);
  SavedCacheInfo info{};
  info.version = static_cast<int>(in.version);
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
