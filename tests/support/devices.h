// Suites that run on every device a cache can be on: TEST_P over kDevices. Where a device is missing its tests are skipped and
// say why, unless the environment's KVMIX_TEST_DEVICE names it: then they fail.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>

#include "kvmix/cache.h"
#include "kvmix/error.h"

namespace kvmix::testing {

inline const char* const kDevices[] = {"cpu", "cuda"};
inline std::string device_name(const ::testing::TestParamInfo<const char*>& info) { return info.param; }

// Why there is no such device; empty if there is one.
inline std::string missing_device(const std::string& device) {
  CacheConfig config;
  config.layers.resize(1);
  config.layers[0].q_heads = config.layers[0].kv_heads = 1;
  config.layers[0].head_dim = 64;
  config.layers[0].scale = 0.125f;
  config.device = device;
  try {
    Cache cache(config);
    return "";
  } catch (const Error& e) {
    if (e.status() != Status::kUnsupported) throw;
    return e.what();
  }
}

inline bool must_be_there(const std::string& device) {
  const char* const wanted = std::getenv("KVMIX_TEST_DEVICE");
  return wanted != nullptr && device == wanted;
}

// For SetUp and bodies of tests, which go on only where it is true: fails or skips the test where there is no such device.
inline bool has_device(const std::string& device) {
  const std::string missing = missing_device(device);
  const auto stop = [&] {
    if (must_be_there(device)) FAIL() << "KVMIX_TEST_DEVICE asks for it, but: " << missing;
    GTEST_SKIP() << missing;
  };
  if (!missing.empty()) stop();
  return missing.empty();
}

class OnDevice : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override { has_device(GetParam()); }
  bool on_cpu() const { return std::string(GetParam()) == "cpu"; }
  CacheConfig here(CacheConfig config) const {
    config.device = GetParam();
    return config;
  }
};

}  // namespace kvmix::testing
