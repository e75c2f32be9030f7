// A model that exists on paper only, and a profile of it.
#pragma once

#include "kvmix/plan.h"

namespace kvmix::testing {

inline ModelShape shape(int layers) {
  ModelShape model;
  model.name = "test model";
  model.architecture = "llama";
  model.fingerprint = "0123456789abcdef";
  model.context_tokens = 32768;
  for (int l = 0; l < layers; ++l) model.layers.push_back({9, 3, 64, 0, 0.125f, 0.0f});
  return model;
}

inline Profile profile(const ModelShape& model) {
  Profile p;
  p.fingerprint = model.fingerprint;
  p.model = model.name;
  p.prompts = 1;
  p.tokens = 100;
  for (size_t l = 0; l < model.layers.size(); ++l) {
    p.key_score.push_back(1.0 + static_cast<double>((l * 7) % 11));
    p.value_score.push_back(1.0 + static_cast<double>((l * 5) % 13));
  }
  return p;
}

}  // namespace kvmix::testing
