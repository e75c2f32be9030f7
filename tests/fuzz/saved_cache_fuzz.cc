// Saved caches from anybody: whatever the bytes, loading ends in a cache that works or in an Error, and leaves nothing behind.
// An input's first byte says how the rest is read: under which token policy (bits 0 and 1, kPolicies), whether the checksum is
// made right again, so that the checks behind it are reached (bit 2: it is not), and whether channels were chosen (bit 3).
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "base/checksum.h"
#include "fuzz/memory_file.h"
#include "fuzz/target.h"
#include "kvmix/error.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

constexpr char kFingerprint[] = "model+plan";
constexpr size_t kMagicBytes = 8;

// With a token policy page lists are written in full, with one that counts attention their mass, and of a low tier lists too.
constexpr const char* kPolicies[] = {"", "snapkv", "h2o", "leankv"};
struct Policies {
  std::string tokens;
  bool channels = false;
};
CacheConfig fuzz_config(const Policies& policies) {
  CacheConfig config;
  if (!policies.tokens.empty()) config.tokens = PolicySpec{policies.tokens, {}};
  if (policies.channels) config.channels = PolicySpec{"think", {{"keep", 0.5}}};
  const int head_dim = policies.channels ? 64 : 32;
  config.layers = {testing::make_layer(2, 1, head_dim, testing::key_codec(2), testing::value_codec(3, 32)),
                   testing::make_layer(2, 1, head_dim, CodecSpec{}, CodecSpec{}, 4)};
  config.layers[0].recent = testing::kRecents.back();
  config.layers[1].sliding_window = 200;
  config.max_bytes = size_t{64} << 20;
  return config;
}

std::string with_checksum(std::string content) {
  if (content.size() < kMagicBytes + 8) return content;
  Checksum sum;
  sum.update(content.data(), kMagicBytes);
  sum.update(content.data() + kMagicBytes, content.size() - kMagicBytes - 8);
  const uint64_t value = sum.value();
  std::memcpy(content.data() + content.size() - 8, &value, 8);
  return content;
}

// Loads the bytes; a cache that is accepted must decode a token, be cut and be removed. Returns whether it was accepted.
bool load_and_use(const std::string& content, const Policies& policies) {
  const fuzz::MemoryFile file(content);
  Cache cache(fuzz_config(policies));
  const size_t empty = cache.memory().total_bytes;
  SequenceId id;
  try {
    id = cache.load(file.path(), kFingerprint);
  } catch (const Error&) {
    if (!cache.sequences().empty() || cache.memory().total_bytes != empty)
      throw std::logic_error("a refused file left something");
    return false;
  }
  std::mt19937 random(1);
  testing::Rows rows = testing::random_rows(cache.config().layers[0], 1, random);
  testing::step(cache, {{id, 1}}, rows);
  try {
    cache.truncate(id, cache.length(id) / 2);
  } catch (const Error&) {  // a sliding window may have left what would be needed
  }
  cache.remove(id);
  if (cache.memory().total_bytes != empty) throw std::logic_error("memory was lost");
  return true;
}

std::string saved(int tokens, const Policies& policies) {
  Cache cache(fuzz_config(policies));
  std::mt19937 random(2);
  const SequenceId id = cache.create();
  for (int done = 0; done < tokens; done += 100) {
    const int n = std::min(100, tokens - done);
    testing::Rows rows = testing::random_rows(cache.config().layers[0], n, random);
    testing::step(cache, {{id, n}}, rows);
  }
  const auto path = std::filesystem::temp_directory_path() / ("kvmix_fuzz_" + std::to_string(getpid()));
  cache.save(id, path.string(), kFingerprint);
  std::ifstream file(path, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  std::filesystem::remove(path);
  return bytes;
}

// Of the first byte.
constexpr unsigned kPolicyBits = 3, kChecksumAsIs = 4, kChannels = 8;

bool accepts(const std::string& input) {
  if (input.empty()) return false;
  const auto how = static_cast<unsigned char>(input[0]);
  const std::string content = input.substr(1);
  const Policies policies{kPolicies[how & kPolicyBits], (how & kChannels) != 0};
  if (policies.channels && policies.tokens == "leankv") return false;  // no such cache
  return load_and_use((how & kChecksumAsIs) != 0 ? content : with_checksum(content), policies);
}

std::vector<fuzz::Seed> seeds() {
  std::vector<fuzz::Seed> out;
  for (size_t policy = 0; policy < std::size(kPolicies); ++policy) {
    // The header is where sizes are; with a policy page lists follow it.
    for (const int tokens : {0, 3, 300, 600}) {
      std::string input(1, static_cast<char>(policy));
      input += saved(tokens, {kPolicies[policy]});
      out.push_back({input, policy > 0 ? size_t{1500} : 220});
    }
  }
  for (const size_t policy : {0, 2}) {
    std::string input(1, static_cast<char>(policy | kChannels));
    input += saved(600, {kPolicies[policy], true});
    out.push_back({input, 1500});
  }
  return out;
}

const fuzz::Registered registered({"saved_cache", seeds, accepts, 24000});

}  // namespace
}  // namespace kvmix
