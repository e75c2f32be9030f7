#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/checksum.h"
#include "base/file.h"
#include "base/fp16.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

TEST(Fp16, EveryValueRoundTrips) {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float f = f16_to_f32(static_cast<uint16_t>(h));
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(f))));
    } else {
      ASSERT_EQ(f32_to_f16(f), h);
    }
  }
}

TEST(Fp16, RoundsToNearestEven) {
  for (uint32_t h = 0; h < 0x7bff; ++h) {
    const float low = f16_to_f32(static_cast<uint16_t>(h)), high = f16_to_f32(static_cast<uint16_t>(h + 1));
    const float middle = low + (high - low) / 2;  // exact: fp16 neighbours are far apart in fp32
    ASSERT_EQ(f32_to_f16(middle), h % 2 == 0 ? h : h + 1);
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 0.0f)), h);
    ASSERT_EQ(f32_to_f16(std::nextafter(middle, 1e9f)), h + 1);
    ASSERT_EQ(f32_to_f16(-middle), 0x8000u | (h % 2 == 0 ? h : h + 1));
  }
  EXPECT_EQ(f32_to_f16(65519.99f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(1e-10f), 0);
}

TEST(Checksum, SeesEveryBit) {
  std::string data(67, 'k');
  const auto sum = [](const std::string& s) {
    Checksum c;
    c.update(s.data(), s.size());
    return c.value();
  };
  const uint64_t good = sum(data);
  for (size_t i = 0; i < data.size() * 8; ++i) {
    std::string bad = data;
    bad[i / 8] = static_cast<char>(bad[i / 8] ^ (1 << (i % 8)));
    EXPECT_NE(sum(bad), good);
  }
}

TEST(AtomicFile, LeavesTheOldFileUntilCommit) {
  const std::string path = ::testing::TempDir() + "/kvmix_atomic_file";
  std::ofstream(path) << "old";
  {
    AtomicFile file(path);
    file.write("half", 4);
  }
  EXPECT_EQ(read_file(path, 100), "old");
  {
    AtomicFile file(path);
    file.write("new", 3);
    file.commit();
  }
  EXPECT_EQ(read_file(path, 100), "new");
  EXPECT_THROW(read_file(path, 2), Error);
  std::filesystem::remove(path);
  EXPECT_THROW(read_file(path, 100), Error);
  EXPECT_THROW(AtomicFile("/nonexistent-folder/file"), Error);
}

TEST(AtomicFile, SaysThatTheDiskIsFull) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  const std::string path = ::testing::TempDir() + "/kvmix_full";
  // The temporary's name is known, so it can be made to lead to a full device.
  const std::string temporary = path + ".tmp-" + std::to_string(getpid());
  std::filesystem::remove(temporary);
  std::filesystem::create_symlink("/dev/full", temporary);
  try {
    AtomicFile file(path);
    file.write("data", 4);
    file.commit();
    FAIL() << "wrote to a full disk";
  } catch (const Error& e) {
    EXPECT_EQ(e.status(), Status::kIo);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::is_symlink(temporary));
}

TEST(Error, StatusesHaveNames) {
  for (int s = 0; s <= 9; ++s) EXPECT_STRNE(status_name(static_cast<Status>(s)), "unknown");
  EXPECT_STREQ(status_name(Status::kCorrupt), "corrupt");
}

}  // namespace
}  // namespace kvmix
