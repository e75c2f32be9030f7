// The pages of --help, at 80 columns.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace kvmix::app {

// An option's name with its default or kind of value, and its description in lines that fit. Ranges and exclusions are left
// to the errors that name them.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override;
  std::string make_option_desc(const CLI::Option* option) const override;
  std::string make_description(const CLI::App* command) const override;
  std::string make_subcommand(const CLI::App* command) const override;
};

}  // namespace kvmix::app
