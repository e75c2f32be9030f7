// JSON Lines from outside: calibration text and tasks.
#pragma once

#include <string>
#include <vector>

#include "kvmix/measure.h"

namespace kvmix {

// {"text": ...} a line. Throws kCorrupt naming `name` and the line.
std::vector<std::string> parse_texts(const std::string& content, const std::string& name);
// {"prompt": ..., "answer": ..., "kind": ...} a line, the last where there is one. Throws as read_tasks.
std::vector<Task> parse_tasks(const std::string& content, const std::string& name);
// Without blanks at either end.
std::string trimmed(const std::string& text);

}  // namespace kvmix
