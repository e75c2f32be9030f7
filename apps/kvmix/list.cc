// kvmix list: the registries.
#include <fmt/core.h>
#include <fmt/ranges.h>

#include <memory>
#include <string>
#include <vector>

#include "command.h"
#include "console.h"
#include "kvmix/cache.h"
#include "kvmix/engine.h"
#include "kvmix/measure.h"
#include "kvmix/plan.h"
#include "text.h"

namespace kvmix::app {
namespace {

// Which kernel and instruction set decode really uses here: asks a small cache that has packed pages.
CacheStats probe_kernel() {
  constexpr int kHeadDim = 64;
  CacheConfig config;
  LayerConfig layer;
  layer.q_heads = layer.kv_heads = 1;
  layer.head_dim = kHeadDim;
  layer.scale = 0.125f;
  layer.sinks = 0;
  layer.window.tokens = 0;
  layer.key.codec = {4, Axis::kChannel, 128, Fit::kMinMax, true};
  layer.value.codec = {4, Axis::kToken, 64, Fit::kMinMax, true};
  config.layers = {layer};
  Cache cache(config);
  const SequenceId sequence = cache.create();
  for (const int n : {kPageTokens, 1}) {
    const std::vector<float> rows(static_cast<size_t>(n) * kHeadDim, 0.5f);
    std::vector<float> out(rows.size());
    const StepItem item{sequence, n};
    cache.begin_step({&item, 1});
    cache.append(0, rows.data(), kHeadDim, rows.data(), kHeadDim, 0, 1);
    cache.attend(0, rows.data(), kHeadDim, out.data(), kHeadDim, 0, 1);
    cache.end_step();
  }
  return cache.stats();
}

// What the device "cuda" runs, and which GPUs are here. A build for GPUs on a machine without one says so and lists the rest.
int list_cuda(const Common& common) {
  const CudaSupport support = cuda_support();
  std::vector<CudaDevice> devices;
  std::string none;
  try {
    devices = cuda_devices();
  } catch (const Error& e) {
    none = e.what();
  }
  std::vector<std::string> here, channels;  // policies, with their defaults
  for (const PolicyInfo& policy : policies()) {
    if (!counts_or_tiers({policy.name, {}})) here.push_back(policy.name);
  }
  for (const PolicyInfo& policy : channel_policies()) channels.push_back(policy.name);
  const auto capability = [](const CudaDevice& d) { return fmt::format("{}.{}", d.capability / 10, d.capability % 10); };
  if (common.json) {
    nlohmann::json json = {{"architectures", support.architectures}, {"bits", support.bits},
                           {"trellis_bits", support.trellis_bits},   {"groups", support.groups},
                           {"head_dims", support.head_dims},         {"token_policies", here},
                           {"channel_policies", channels},           {"devices", nlohmann::json::array()}};
    if (!none.empty()) json["no_device"] = none;
    for (const CudaDevice& d : devices) {
      json["devices"].push_back({{"name", d.name},
                                 {"compute_capability", capability(d)},
                                 {"memory_bytes", d.total_bytes},
                                 {"head_dims", d.head_dims},
                                 {"prefill_kernel", d.prefill_kernel}});
    }
    print_json(json);
    return kExitOk;
  }
  fmt::print("GPUs\n");
  if (!none.empty()) fmt::print("  none: {}\n", none);
  for (const CudaDevice& d : devices) {
    fmt::print("  {}, compute capability {}, {}: head_dim {}; prefill on {}\n", d.name, capability(d),
               human_bytes(d.total_bytes), fmt::join(d.head_dims, ", "),
               d.prefill_kernel ? "its own kernel" : "the page kernel");
  }
  fmt::print("\nbuilt for            {}\n", support.architectures);
  fmt::print("widths               {} bits, uniform with a zero point; keys' scales per channel are fast, per token slow\n",
             support.bits);
  fmt::print(
      "trellis codes        {} bits, keys with a zero point, values without; slower than uniform ones, so that plans take "
      "them with --codes all alone\n",
      support.trellis_bits);
  fmt::print("groups               {}, of trellises 128\n", support.groups);
  fmt::print("head_dim             {}\n", support.head_dims);
  fmt::print("token policies       {}\n", fmt::join(here, ", "));
  fmt::print("channel policies     {}, of keys with scales per channel\n", fmt::join(channels, ", "));
  fmt::print("not on a GPU         other token policies, ranks, other codecs, the exact kernel\n\n");
  fmt::print("what older and newer GPUs lack\n");
  fmt::print("  {:<18} {}\n", "9.0 (H100, H200)", "nothing: where all was measured");
  fmt::print("  {:<18} {}\n", "8.0 (A100)",
             "the prefill kernel, which needs warpgroup instructions: chunks run on the page kernel; not measured");
  fmt::print("  {:<18} {}\n", "8.6, 8.9 (Ada)",
             "that too, and head_dim 256: a thread block has 99 KiB of shared memory there; not measured");
  fmt::print("  {:<18} {}\n", "10.0 and later",
             "the prefill kernel; a build with 90-virtual is compiled when first used; not measured");
  return kExitOk;
}

int list(const Common& common) {
  const CacheStats used = probe_kernel();
  if (common.json) {
    nlohmann::json json;
    for (const auto& c : codecs())
      json["codecs"].push_back({{"name", c.name}, {"bits", c.bits}, {"description", c.description}});
    for (const auto& m : row_maps()) {
      json["row_maps"].push_back(
          {{"name", m.name}, {"description", m.description}, {"keys", m.keys}, {"values", m.values}, {"fields", m.fields}});
    }
    for (const auto& p : planners()) {
      nlohmann::json options = nlohmann::json::object();
      for (const auto& [name, help] : p.options) options[name] = help;
      json["planners"].push_back({{"name", p.name},
                                  {"description", p.description},
                                  {"options", options},
                                  {"needs_profile", p.needs_profile},
                                  {"needs_budget", p.needs_budget}});
    }
    for (const auto& [key, registry] : {std::pair{"token_policies", policies()}, {"channel_policies", channel_policies()}}) {
      for (const auto& p : registry) {
        nlohmann::json parameters = nlohmann::json::object();
        for (const auto& q : p.parameters) parameters[q.name] = q.help + " (" + default_text(q) + ")";
        json[key].push_back({{"name", p.name}, {"description", p.description}, {"paper", p.paper}, {"parameters", parameters}});
      }
    }
    for (const auto& f : factorisations()) json["factorisations"].push_back({{"name", f.name}, {"description", f.description}});
    for (const auto& a : architectures()) json["architectures"].push_back({{"name", a.name}, {"description", a.description}});
    for (const auto& k : attention_kernels()) {
      json["kernels"].push_back({{"name", k.name}, {"description", k.description}, {"available", k.available}});
    }
    json["decode_kernel"] = used.kernel;
    print_json(json);
    return kExitOk;
  }
  const auto section = [](const char* title, const auto& entries) {
    fmt::print("{}\n", title);
    for (const auto& entry : entries) fmt::print("  {:<18} {}\n", entry.name, entry.description);
    fmt::print("\n");
  };
  section("codecs", codecs());
  section("row maps", row_maps());
  section("planners", planners());
  section("token policies", policies());
  section("channel policies", channel_policies());
  section("factorisations", factorisations());
  section("architectures", architectures());
  fmt::print("attention kernels\n");
  for (const auto& kernel : attention_kernels()) {
    fmt::print("  {:<18} {}{}\n", kernel.name, kernel.description, kernel.available ? "" : " (not on this machine)");
  }
  fmt::print("\ndecode runs on {} here\n", used.kernel);
  return kExitOk;
}

}  // namespace

void add_list(CommandContext& context) {
  CLI::App* command =
      add_command(context, "list", "Codecs, planners, architectures, kernels, instruction set in use", "kvmix list");
  const auto device = std::make_shared<std::string>("cpu");
  add_device_option(command, *device);
  command->callback([&context, device] { context.action = *device == "cuda" ? list_cuda : list; });
}

}  // namespace kvmix::app
