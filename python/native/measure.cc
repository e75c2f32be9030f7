// What is measured on a model: profiles, plans measured as a whole, evaluations.
#include "kvmix/measure.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "arrays.h"
#include "kvmix/eval.h"
#include "module.h"

namespace kvmix::python {

const std::shared_ptr<const Model>& model_of(nb::handle object);

namespace {

using namespace nb::literals;

std::vector<std::vector<Token>> prompts_of(const std::shared_ptr<const Model>& model, const std::string& file, int prompts,
                                           int tokens, uint64_t seed, const std::string& device, int threads,
                                           const Progress& progress) {
  CalibrationOptions options;
  options.prompts = prompts;
  options.tokens = tokens > 0 ? tokens : static_cast<int>(std::min<int64_t>(2048, model->shape().context_tokens));
  options.seed = seed;
  options.file = file;
  options.device = device;
  return calibration_prompts(model, options, threads, progress);
}

Profile make_profile(nb::handle object, const std::string& file, int prompts, int tokens, uint64_t seed,
                     const std::optional<std::string>& sensitivity, int windows, const std::string& device, int threads,
                     const nb::object& progress) {
  const auto model = model_of(object);
  Profile result;
  run_long(progress, [&](const Progress& report) {
    const auto text = prompts_of(model, file, prompts, tokens, seed, device, threads, report);
    result.fingerprint = model->shape().fingerprint;
    result.model = model->shape().name;
    result.seed = seed;
    result.text = text_checksum(text);
    if (!sensitivity) {
      profile_gradients(model, text, {.device = device, .threads = threads, .partial = {}}, result, report);
      return;
    }
    SensitivityOptions options;
    options.metric = *sensitivity;
    options.windows = windows;
    options.tokens = text.front().size() < 512 ? 2048 : static_cast<int64_t>(text.front().size());  // short ones are joined
    options.device = device;
    options.threads = threads;
    profile_sensitivity(model, text, options, result, report);
  });
  return result;
}

Plan measured_plan(nb::handle object, const Profile& profile, const std::string& planner, double bits, size_t bytes,
                   int64_t context, int sequences, const std::map<std::string, std::string>& options, int measurements,
                   const std::string& file, int windows, int threads, const nb::object& progress) {
  const auto model = model_of(object);
  check_profile(profile, model->shape(), false);
  Plan plan;
  run_long(progress, [&](const Progress& report) {
    // Text of its own, so that a plan is not fitted twice to the same words; the last third is held out.
    auto searched = prompts_of(model, file, windows + (windows + 1) / 2, 0, profile.seed + 1, "cpu", threads, report);
    const auto cut = static_cast<ptrdiff_t>(searched.size() * 2 / 3);
    std::vector<std::vector<Token>> held_out(searched.begin() + cut, searched.end());
    searched.resize(static_cast<size_t>(cut));
    const auto meter = make_plan_meter(model, std::move(searched), std::move(held_out), threads);
    PlannerRequest request;
    request.model = &model->shape();
    request.profile = &profile;
    request.budget = {bits, bytes, sequences, context, bytes > 0};
    request.options = options;
    request.meter = meter.get();
    request.measurements = measurements;
    request.progress = report;
    plan = make_plan(planner, request);
  });
  return plan;
}

nb::list evaluate_plans(nb::handle object, const std::string& text, const std::vector<std::pair<std::string, Plan>>& plans,
                        const std::vector<std::string>& peers, int64_t context, int windows, const std::string& kernel,
                        bool exact, bool float_weights, bool force, int threads, const nb::object& progress) {
  const auto model = model_of(object);
  EvalOptions options;
  options.context = context;
  options.windows = windows;
  options.threads = threads;
  options.exact = exact;
  options.kernel = kernel;
  options.force_plan = force;
  options.float_weights = float_weights;
  std::vector<EvalSubject> subjects;
  for (const auto& [name, plan] : plans) {
    check_plan(plan, model->shape(), force, name);
    subjects.push_back({name, plan, ""});
  }
  for (const std::string& type : peers) subjects.push_back({"llama.cpp " + type, std::nullopt, type});
  std::vector<EvalRow> rows;
  run_long(progress, [&](const Progress& report) { rows = evaluate(model, text, subjects, options, report); });
  nb::list list;
  for (const EvalRow& r : rows) {
    nb::dict d;
    d["name"] = r.name;
    d["perplexity"] = r.perplexity;
    d["perplexity_ratio"] = r.perplexity_ratio;
    d["kl_mean"] = r.kl_mean;
    d["kl_stderr"] = r.kl_stderr;
    d["kl_p99"] = r.kl_p99;
    d["kl_max"] = r.kl_max;
    d["top1"] = r.top1;
    d["bits_per_element"] = r.bits_per_element;
    d["body_bits"] = r.body_bits;
    d["kept"] = r.kept;
    d["cache_bytes"] = r.cache_bytes;
    d["scored_tokens"] = r.scored_tokens;
    d["kl_by_position"] = r.kl_by_position;
    d["seconds"] = r.seconds;
    d["lost"] = r.lost;
    list.append(d);
  }
  return list;
}

}  // namespace

void bind_measure(nb::module_& m) {
  m.def("make_profile", &make_profile, "model"_a, "file"_a, "prompts"_a, "tokens"_a, "seed"_a, "sensitivity"_a.none(),
        "windows"_a, "device"_a, "threads"_a, "progress"_a.none());
  m.def("make_measured_plan", &measured_plan, "model"_a, "profile"_a, "planner"_a, "bits"_a, "bytes"_a, "context"_a,
        "sequences"_a, "options"_a, "measurements"_a, "file"_a, "windows"_a, "threads"_a, "progress"_a.none());
  m.def("evaluate_plans", &evaluate_plans, "model"_a, "text"_a, "plans"_a, "peers"_a, "context"_a, "windows"_a, "kernel"_a,
        "exact"_a, "float_weights"_a, "force"_a, "threads"_a, "progress"_a.none());
}

}  // namespace kvmix::python
