// One kind of input from outside, for a fuzzer. Each *_fuzz.cc registers one; libfuzzer.cc hands it what libFuzzer finds
// (scripts/fuzz), mutations_test.cc a bounded number of fixed mutations.
#pragma once

#include <string>
#include <vector>

namespace kvmix::fuzz {

struct Seed {
  std::string bytes;
  size_t reach;  // most mutations go to the first so many bytes, where sizes are
};

struct Target {
  const char* name;
  std::vector<Seed> (*seeds)();  // inputs that are accepted
  // Whether the input is accepted. Whatever it is, this returns; a fault of ours is a crash or any exception but Error.
  bool (*accepts)(const std::string& input);
  int mutations;  // for mutations_test.cc, over all seeds
};

inline std::vector<Target>& targets() {
  static std::vector<Target> all;
  return all;
}

struct Registered {
  explicit Registered(const Target& target) { targets().push_back(target); }
};

inline Seed whole(const std::string& bytes) { return {bytes, bytes.size()}; }

}  // namespace kvmix::fuzz
