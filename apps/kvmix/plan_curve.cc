#include "plan_curve.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>

#include "console.h"
#include "kvmix/error.h"
#include "plan_view.h"
#include "svg.h"
#include "text.h"

namespace kvmix::app {

int plan_axes_curve(const PlanArguments& arguments, const Common& common, const PlannerRequest& request,
                    const std::shared_ptr<const Model>& model, const AxesTask& task) {
  const ModelShape& shape = *request.model;
  const std::string folder = arguments.out.empty() ? "plans" : arguments.out;
  const auto curves = axes_curves(model, task, arguments.points, progress_reporter(common));
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw Error(Status::kIo, folder + ": " + error.message() + "; name a folder that can be written with -o");
  Table table({"plan", "tokens", "bits", "of a sequence", "mean KL", "+-", "top-1"});
  table.left(1);
  Chart chart{"Plans of " + shape.name + " at " + std::to_string(arguments.context) + " tokens",
              "bits per element of all tokens, all bytes",
              "mean KL to f16, nats per token",
              true,
              true,
              {}};
  nlohmann::json list = nlohmann::json::array();
  for (const auto& line : curves) {
    Series series{"tokens " + line.front().tokens, {}, true, {}};
    for (const AxesCandidate& c : line) {
      const double bits = predict_bits_per_element(cache_config(c.plan, shape), arguments.context);
      std::string name = c.tokens;
      std::replace(name.begin(), name.end(), ' ', '-');
      const std::string file = fmt::format("{}/{}-{}-{:06.3f}.json", folder, c.plan.planner, name, bits);
      write_plan(c.plan, file);
      table.add({file, c.tokens, fmt::format("{:.3f}", bits), human_bytes(c.bytes), fmt::format("{:.5f}", c.kl),
                 fmt::format("{:.5f}", c.kl_error), fmt::format("{:.2f} %", 100 * c.top1)});
      series.points.emplace_back(bits, c.kl);
      series.labels.push_back(std::filesystem::path(file).filename());
      list.push_back({{"plan", file},
                      {"tokens", c.tokens},
                      {"bytes", c.bytes},
                      {"bits_per_element", bits},
                      {"kl_mean", c.kl},
                      {"kl_stderr", c.kl_error},
                      {"top1", c.top1}});
    }
    chart.series.push_back(std::move(series));
  }
  const std::string picture = folder + "/pareto.svg";
  write_file_atomically(picture, svg_file(chart));
  if (common.json) {
    print_json({{"planner", arguments.planner}, {"context", arguments.context}, {"picture", picture}, {"plans", list}});
    return kExitOk;
  }
  table.print();
  fmt::print("\nwrote {} plans and {}; sizes at {} tokens, all bytes\n", list.size(), picture, arguments.context);
  return kExitOk;
}

int plan_curve(const PlanArguments& arguments, const Common& common, const PlannerRequest& request) {
  const ModelShape& shape = *request.model;
  const std::string folder = arguments.out.empty() ? "plans" : arguments.out;
  const std::vector<Plan> curve = make_curve(arguments.planner, request, arguments.points);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw Error(Status::kIo, folder + ": " + error.message() + "; name a folder that can be written with -o");
  const std::string metric = curve.front().predicted ? curve.front().predicted->metric : "";
  const double full = static_cast<double>(predict_bytes(cache_config(f16_plan(shape), shape), arguments.context));
  Table table(
      {"plan", "bits", "of a sequence", "smaller", "K bits", "V bits", "predicted " + (metric.empty() ? "cost" : metric)});
  Chart chart{"Plans of " + shape.name + " at " + std::to_string(arguments.context) + " tokens",
              "bits per element, all bytes",
              "predicted " + metric + (metric == "output" ? "" : ", nats per token"),
              true,
              true,
              {}};
  Series series{arguments.planner, {}, true, {}};
  nlohmann::json list = nlohmann::json::array();
  for (const Plan& plan : curve) {
    const CacheConfig config = cache_config(plan, shape);
    const auto bytes = static_cast<double>(predict_bytes(config, arguments.context));
    const double bits = predict_bits_per_element(config, arguments.context);
    const std::string file = fmt::format("{}/{}-{:05.2f}.json", folder, plan.planner, bits);
    write_plan(plan, file);
    table.add({file, fmt::format("{:.3f}", bits), human_bytes(bytes), fmt::format("{:.2f}x", full / bytes),
               fmt::format("{:.2f}", mean_bits(plan, Side::kKey)), fmt::format("{:.2f}", mean_bits(plan, Side::kValue)),
               plan.predicted ? fmt::format("{:.3g}", plan.predicted->cost) : std::string("-")});
    if (plan.predicted) {
      series.points.emplace_back(bits, plan.predicted->cost);
      series.labels.push_back(std::filesystem::path(file).filename());
    }
    list.push_back({{"plan", file}, {"bytes", bytes}, {"bits_per_element", bits}, {"compression", full / bytes}});
    if (plan.predicted) list.back()["predicted"] = plan.predicted->cost;
  }
  std::string picture;
  if (!series.points.empty()) {
    chart.series.push_back(std::move(series));
    picture = folder + "/pareto.svg";
    write_file_atomically(picture, svg_file(chart));
  }
  if (common.json) {
    print_json({{"planner", arguments.planner},
                {"context", arguments.context},
                {"metric", metric},
                {"picture", picture},
                {"plans", list}});
    return kExitOk;
  }
  table.print();
  fmt::print("\nwrote {} plans{}; sizes at {} tokens, all bytes\n", curve.size(), picture.empty() ? "" : " and " + picture,
             arguments.context);
  return kExitOk;
}

}  // namespace kvmix::app
