// The cache's private state, shared by the files of this folder.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "base/team.h"
#include "cache/governed.h"
#include "cache/ledger.h"
#include "kvmix/cache.h"

namespace kvmix {

struct Cache::Impl {
  explicit Impl(CacheConfig c);

  Governed governed;
  CacheConfig& config;
  FormatTable formats;
  std::vector<LayerFormats> ids;  // by layer
  Ledger ledger;
  std::unique_ptr<Backend> backend;
  int64_t sealed_pages = 0;
  std::vector<PolicyScratch> policy_scratch;  // by thread
  std::vector<FreedPage> reserve;             // for what the prompts that end in the open step will keep
  std::unique_ptr<Team> team;                 // of step_layer

  const PageFormat& format(const PageEntry& entry) const { return formats[static_cast<FormatId>(entry.format)]; }
  void release(std::span<const FreedPage> pages);
  void allocate_changes();
  PageHandle allocate(FormatId format);
  void abort();
  // When the policy is asked (src/cache/decide.cc): what such a step of a sequence is followed by, as it is before the step;
  // pages that its layers may take at most then; and the decision.
  std::optional<Moment> moment(const SequencePages& sequence, Ledger::PromptPart part, int n_tokens) const;
  std::vector<FormatId> pages_to_reserve(const SequencePages& sequence, Moment moment, int64_t end) const;
  void fill_reserve(std::span<const StepItem> items);
  void release_reserve();
  void decide(SequenceId id, Moment moment);
  std::vector<Ledger::Regroup> decide_layer(SequenceId id, SequencePages& sequence, size_t layer, Moment moment,
                                            PolicyScratch& scratch);
  void compact(SequenceId id, Ledger::Compactions compactions);
  void check_decoded(std::span<const StepItem> items) const;
  void take_mass(const StepEntry& entry);
  // Chooses channels for the layer's heads that hold no page of chosen ones yet; tokens that `dropped` names by head do not
  // count. (src/cache/choose.cc)
  void choose_channels(SequenceId id, size_t layer, std::span<const Ledger::Regroup> dropped);
};

}  // namespace kvmix
