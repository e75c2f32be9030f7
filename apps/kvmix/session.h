// What generate and chat share: a model with a cache, sampling options, and the closing line.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "command.h"
#include "kvmix/engine.h"

namespace kvmix::app {

struct SessionArguments {
  std::string device = "cpu";
  std::string model, cache = "f16", kernel, chat_template;
  GenerateOptions generate;
  bool force = false;
};

void add_session_options(CLI::App* command, SessionArguments& arguments);
std::unique_ptr<Engine> open_engine(const SessionArguments& arguments, const Common& common);
// The template that --chat-template names, else the model's own. Throws for a model without one.
ChatTemplate chat_template(const SessionArguments& arguments, const Model& model);
// "[36 tokens at 61.2 tokens/s after ..." on standard error.
void print_closing_line(Engine& engine, const GenerateResult& result);
nlohmann::json result_json(Engine& engine, const GenerateResult& result);

}  // namespace kvmix::app
