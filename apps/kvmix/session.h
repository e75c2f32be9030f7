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
  std::string model, cache = "f16", kernel;
  GenerateOptions generate;
  bool force = false;
};

void add_session_options(CLI::App* command, SessionArguments& arguments);
std::unique_ptr<Engine> open_engine(const SessionArguments& arguments, const Common& common);
// The tokens of a conversation in the model's chat template. What messages say is text: markers in them are not special tokens.
std::vector<Token> chat_tokens(const Model& model, std::span<const ChatMessage> messages);
// "[36 tokens at 61.2 tokens/s after ..." on standard error.
void print_closing_line(Engine& engine, const GenerateResult& result);
nlohmann::json result_json(Engine& engine, const GenerateResult& result);

}  // namespace kvmix::app
