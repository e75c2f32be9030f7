// kvmix plan --pareto: curves of plans, as files of a folder and a picture.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "command.h"
#include "plan_axes.h"

namespace kvmix::app {

struct PlanArguments {
  std::string factors;
  std::string device = "cpu";
  std::string model, planner = "kvmix", profile, out, fit, calibration, tasks, axes = "bits";
  std::string tokens;
  double bits = 0;
  int64_t context = 8192;
  int sequences = 1;
  bool pareto = false;
  int points = 24;
  int measurements = 0, needles = 0;
  int windows = 0;  // 0: kUsualWindows
  int64_t seed = -1;
  std::map<std::string, std::string> options;  // of planners; only those given
};

// Every plan of a planner's curve. Returns the exit status.
int plan_curve(const PlanArguments& arguments, const Common& common, const PlannerRequest& request);
// The curves of tokens and bits, in one picture.
int plan_axes_curve(const PlanArguments& arguments, const Common& common, const PlannerRequest& request,
                    const std::shared_ptr<const Model>& model, const AxesTask& task);

}  // namespace kvmix::app
