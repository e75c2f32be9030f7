// Tasks as JSON Lines.
#include <stdexcept>

#include "fuzz/target.h"
#include "kvmix/error.h"
#include "profile/json_lines.h"

namespace kvmix {
namespace {

bool accepts(const std::string& input) {
  try {
    for (const Task& task : parse_tasks(input, "tasks")) {
      if (trimmed(task.prompt).empty() || trimmed(task.answer).empty()) throw std::logic_error("an empty task was taken");
    }
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<fuzz::Seed> seeds() {
  std::string lines;
  for (int i = 0; i < 3; ++i)
    lines += "{\"prompt\": \"1 + " + std::to_string(i) + " =\", \"answer\": \" " + std::to_string(i + 1) + "\"" +
             (i > 0 ? R"(, "kind": "sum"})" : "}") + "\n";
  return {fuzz::whole(lines)};
}

const fuzz::Registered registered({"tasks", seeds, accepts, 20000});

}  // namespace
}  // namespace kvmix
