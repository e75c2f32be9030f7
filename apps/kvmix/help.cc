#include "help.h"

#include <algorithm>
#include <sstream>

namespace kvmix::app {
namespace {

constexpr size_t kColumns = 80;

// Lines of at most `columns`, broken between words; what is indented stays so.
std::string wrapped(const std::string& text, size_t columns) {
  std::string out;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!out.empty()) out += '\n';
    const size_t indent = std::min(line.find_first_not_of(' '), line.size());
    size_t used = indent;
    out.append(indent, ' ');
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      if (used > indent && used + 1 + word.size() > columns) {
        out += '\n' + std::string(indent + (indent > 0 ? 2 : 0), ' ');
        used = indent + (indent > 0 ? 2 : 0);
      } else if (used > indent) {
        out += ' ';
        ++used;
      }
      out += word;
      used += word.size();
    }
  }
  return out;
}

}  // namespace

std::string HelpFormatter::make_option_opts(const CLI::Option* option) const {
  if (option->get_type_size() == 0) return "";
  if (!option->get_default_str().empty()) return " =" + option->get_default_str();
  const std::string type = option->get_type_name();
  return " " + type.substr(0, type.find_first_of(":[ "));
}

std::string HelpFormatter::make_option_desc(const CLI::Option* option) const {
  return wrapped(option->get_description(), kColumns - get_column_width());
}

std::string HelpFormatter::make_description(const CLI::App* command) const {
  return wrapped(command->get_description(), kColumns) + "\n";
}

std::string HelpFormatter::make_subcommand(const CLI::App* command) const {
  std::stringstream out;
  CLI::detail::format_help(out, command->get_name(), wrapped(command->get_description(), kColumns - get_column_width()),
                           get_column_width());
  return out.str();
}

}  // namespace kvmix::app
