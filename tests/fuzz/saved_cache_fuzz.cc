// Saved caches from anybody: whatever the bytes, loading ends in a cache that works or in an Error, and leaves nothing behind.
// LLVMFuzzerTestOneInput is libFuzzer's entry point; the test below drives it with a bounded number of fixed mutations.
// Checksums are made right again, so that the checks behind them are reached.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/checksum.h"
#include "kvmix/error.h"
#include "support/cache_fixture.h"

namespace kvmix {
namespace {

constexpr char kFingerprint[] = "model+plan";
constexpr size_t kMagicBytes = 8;

// With a token policy page lists are written in full, with one that counts attention their mass, and of a low tier lists too.
constexpr const char* kPolicies[] = {"", "snapkv", "h2o", "leankv"};
CacheConfig fuzz_config(const std::string& policy) {
  CacheConfig config;
  if (!policy.empty()) config.tokens = PolicySpec{policy, {}};
  config.layers = {testing::make_layer(2, 1, 32, testing::key_codec(2), testing::value_codec(3, 32)),
                   testing::make_layer(2, 1, 32, CodecSpec{}, CodecSpec{}, 4)};
  config.layers[0].recent = testing::kRecents.back();
  config.layers[1].sliding_window = 200;
  config.max_bytes = size_t{64} << 20;
  return config;
}

std::string fuzz_path() {
  static const std::string path = ::testing::TempDir() + "/kvmix_fuzz_" + std::to_string(getpid());
  return path;
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
bool load_and_use(const std::string& content, const std::string& policy) {
  std::filesystem::remove(fuzz_path());  // truncating in place would make some file systems flush
  std::ofstream(fuzz_path(), std::ios::binary) << content;
  Cache cache(fuzz_config(policy));
  const size_t empty = cache.memory().total_bytes;
  SequenceId id;
  try {
    id = cache.load(fuzz_path(), kFingerprint);
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

}  // namespace
}  // namespace kvmix

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string content = kvmix::with_checksum(std::string(reinterpret_cast<const char*>(data), size));
  for (const char* policy : kvmix::kPolicies) kvmix::load_and_use(content, policy);
  return 0;
}

namespace kvmix {
namespace {

std::string saved(int tokens, const std::string& policy) {
  Cache cache(fuzz_config(policy));
  std::mt19937 random(2);
  const SequenceId id = cache.create();
  for (int done = 0; done < tokens; done += 100) {
    const int n = std::min(100, tokens - done);
    testing::Rows rows = testing::random_rows(cache.config().layers[0], n, random);
    testing::step(cache, {{id, n}}, rows);
  }
  cache.save(id, fuzz_path(), kFingerprint);
  std::ifstream file(fuzz_path(), std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

void mutate_and_load(const std::string& policy) {
  std::mt19937 random(3);
  int accepted = 0;
  for (const int tokens : {0, 3, 300, 600}) {
    const std::string good = saved(tokens, policy);
    ASSERT_TRUE(load_and_use(good, policy)) << tokens;
    for (int i = 0; i < 1500; ++i) {
      std::string bad = good;
      // The header is where sizes are.
      const size_t reach = random() % 4 == 0 ? bad.size() : std::min<size_t>(bad.size(), policy.empty() ? 220 : 1500);
      for (unsigned edits = 1 + random() % 3; edits > 0; --edits) {
        const size_t at = random() % reach;
        switch (random() % 4) {
          case 0:
            bad[at] = static_cast<char>(bad[at] ^ (1 << (random() % 8)));
            break;
          case 1: {
            const int64_t odd[] = {0, -1, 1, INT64_MAX, INT64_MIN, int64_t{1} << 32, int64_t{1} << 39, 127, 128, 129};
            const int64_t value = odd[random() % std::size(odd)];
            const size_t width = random() % 2 == 0 ? 4 : 8;
            if (at + width <= bad.size()) std::memcpy(bad.data() + at, &value, width);
            break;
          }
          case 2:
            bad.resize(bad.size() - std::min(bad.size() - 1, static_cast<size_t>(random() % 200)));
            break;
          default:
            bad.insert(at, std::string(random() % 64, '\x01'));
            break;
        }
        if (bad.size() < reach) break;
      }
      if (random() % 8 != 0) bad = with_checksum(bad);
      accepted += load_and_use(bad, policy) ? 1 : 0;
    }
  }
  EXPECT_GT(accepted, 0);  // changed codes are valid codes: some must reach the kernels
  std::filesystem::remove(fuzz_path());
}

TEST(SavedCacheFuzz, MutatedFilesAreRefusedOrWork) { mutate_and_load(""); }
TEST(SavedCacheFuzz, MutatedPageListsAreRefusedOrWork) { mutate_and_load("snapkv"); }
TEST(SavedCacheFuzz, MutatedMassIsRefusedOrWorks) { mutate_and_load("h2o"); }
TEST(SavedCacheFuzz, MutatedTiersAreRefusedOrWork) { mutate_and_load("leankv"); }

}  // namespace
}  // namespace kvmix
