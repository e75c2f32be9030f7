// Calibration text as JSON Lines.
#include "fuzz/target.h"
#include "kvmix/error.h"
#include "profile/json_lines.h"

namespace kvmix {
namespace {

bool accepts(const std::string& input) {
  try {
    parse_texts(input, "calibration");
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<fuzz::Seed> seeds() {
  return {fuzz::whole(
      "{\"text\": \"The tide is out.\"}\n\n{\"text\": \"caf\xc3\xa9 \\u00e9 \\ud83d\\ude00\", \"n\": [1.5e3, null]}\n")};
}

const fuzz::Registered registered({"calibration", seeds, accepts, 20000});

}  // namespace
}  // namespace kvmix
