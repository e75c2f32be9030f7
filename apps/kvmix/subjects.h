// The caches that eval and bench compare: plans from files, uniform widths in short, and the peer's caches.
#pragma once

#include <string>
#include <vector>

#include "command.h"
#include "kvmix/eval.h"

namespace kvmix::app {

struct SubjectArguments {
  std::vector<std::string> plans;     // files
  std::vector<std::string> uniforms;  // "K/V" widths
  bool peer = false;
  std::vector<std::string> peer_types = {"f16", "q8_0", "q4_0"};
  bool force = false;
  std::string device = "cpu";
};

void add_subject_options(CLI::App* command, SubjectArguments& arguments);
// In the order uniform, plans, peers. Throws for a plan of another model unless forced.
std::vector<EvalSubject> make_subjects(const SubjectArguments& arguments, const Model& model);

// "f16", widths as "4/4", or a plan file. Throws as read_plan and check_plan do.
Plan resolve_plan(const std::string& text, const Model& model, bool force);

}  // namespace kvmix::app
