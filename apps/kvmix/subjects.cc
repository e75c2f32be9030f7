#include "subjects.h"

#include <filesystem>
#include <set>
#include <utility>

#include "kvmix/error.h"

namespace kvmix::app {
namespace {

// Splits "4/3" into its two widths; false if the text is not of that form.
bool split_widths(const std::string& text, std::string& key, std::string& value) {
  const size_t slash = text.find('/');
  if (slash == std::string::npos || text.find_first_not_of("0123456789/") != std::string::npos) return false;
  key = text.substr(0, slash);
  value = text.substr(slash + 1);
  return !key.empty() && !value.empty() && value.find('/') == std::string::npos;
}

Plan uniform_plan(const std::string& text, const Model& model) {
  PlannerRequest request;
  request.model = &model.shape();
  if (!split_widths(text, request.options["k-bits"], request.options["v-bits"])) {
    throw UsageError("'" + text + "' is not a pair of widths: write key bits/value bits, e.g. 4/4");
  }
  return make_plan("uniform", request);
}

}  // namespace

void add_subject_options(CLI::App* command, SubjectArguments& arguments) {
  command->add_option("--plan", arguments.plans, "A plan file as a row; may be repeated")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--uniform", arguments.uniforms, "Key/value bits for all layers as a row, e.g. 4/4; may be repeated")
      ->expected(1)
      ->allow_extra_args(false)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_flag("--peer", arguments.peer, "Rows of llama.cpp's own caches, in this process");
  command->add_option("--peer-types", arguments.peer_types, "Which of them")->delimiter(',')->capture_default_str();
  add_device_option(command, arguments.device);
  command->add_flag("--force", arguments.force, "Take plans that were made for another model of the same shape");
}

Plan resolve_plan(const std::string& text, const Model& model, bool force) {
  if (text == "f16") return f16_plan(model.shape());
  std::string key, value;
  if (split_widths(text, key, value) && !std::filesystem::exists(text)) return uniform_plan(text, model);
  if (!std::filesystem::exists(text)) {
    // What llama.cpp calls its caches; ours of as many bits are laid out otherwise, so the name would promise too much.
    for (const auto& [theirs, ours] :
         {std::pair{"q8_0", "8/8"}, {"q5_0", "5/5"}, {"q5_1", "5/5"}, {"q4_0", "4/4"}, {"q4_1", "4/4"}, {"iq4_nl", "4/4"}}) {
      if (text == theirs) {
        throw UsageError("'" + text + "' is a cache of llama.cpp: ours of as many bits is --cache " + ours +
                         ", and --peer runs llama.cpp's own in eval and bench");
      }
    }
    if (text.find_first_of("./") == std::string::npos)
      throw UsageError("'" + text + "' is no cache: write f16, key/value bits such as 8/8 or 4/4, or the name of a plan file");
  }
  Plan plan = read_plan(text);
  check_plan(plan, model.shape(), force, text);
  return plan;
}

std::vector<EvalSubject> make_subjects(const SubjectArguments& arguments, const Model& model) {
  std::vector<EvalSubject> subjects;
  std::set<std::string> names;
  for (const std::string& text : arguments.uniforms) {
    subjects.push_back({"uniform " + text, uniform_plan(text, model), ""});
  }
  for (const std::string& file : arguments.plans) {
    std::string name = std::filesystem::path(file).stem().string();
    if (!names.insert(name).second) name = file;
    subjects.push_back({name, resolve_plan(file, model, arguments.force), ""});
  }
  if (arguments.peer) {
    for (const std::string& type : arguments.peer_types) subjects.push_back({"llama.cpp " + type, std::nullopt, type});
  }
  return subjects;
}

}  // namespace kvmix::app
