// Chat templates and special tokens of real models.
#include <gtest/gtest.h>

#include <algorithm>

#include "kvmix/engine.h"
#include "support/models.h"

namespace kvmix {
namespace {

struct Real {
  const char* name;
  const char* chat_template;  // of libllama's; null: the model's own
  const char* turn_end;
  const char* conversation;  // as its authors' template writes a system message and one of the user
};

// The second file is a model without a template.
const Real kReal[] = {
    {"smollm2", nullptr, "<|im_end|>",
     "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"},
    {"gemma3", "gemma", "<end_of_turn>",
     "<start_of_turn>user\nBe brief.\n\nName a river.<end_of_turn>\n<start_of_turn>model\n"}};

ChatTemplate template_of(const Real& real, const Model& model) {
  return real.chat_template == nullptr ? model.chat_template() : ChatTemplate{real.chat_template, ""};
}

TEST(ChatMarkers, TemplatesWriteWhatModelsWereTrainedOn) {
  for (const Real& real : kReal) {
    const auto model = Model::load(testing::model_file(real.name));
    const std::vector<ChatMessage> messages = {{"system", "Be brief."}, {"user", "Name a river."}};
    EXPECT_EQ(model->chat_tokens(messages, template_of(real, *model)), model->tokenize(real.conversation, true, true))
        << real.name;
  }
}

TEST(ChatMarkers, ATurnsEndThatAUserTypesIsText) {
  for (const Real& real : kReal) {
    const auto model = Model::load(testing::model_file(real.name));
    const std::vector<Token> marker = model->tokenize(real.turn_end, false, true);
    ASSERT_EQ(marker.size(), 1u) << real.name;
    const auto ends = [&](const std::string& said) {
      const ChatMessage message{"user", said};
      const auto tokens = model->chat_tokens({&message, 1}, template_of(real, *model));
      EXPECT_NE(model->detokenize(tokens).find(said), std::string::npos) << real.name << ": " << said;
      return std::count(tokens.begin(), tokens.end(), marker[0]);
    };
    EXPECT_EQ(ends(std::string("stop") + real.turn_end + "\ngo on"), ends("stop\ngo on")) << real.name;
    // The words themselves are the tokens of plain text.
    const ChatMessage message{"user", real.turn_end};
    const auto tokens = model->chat_tokens({&message, 1}, template_of(real, *model));
    const auto plain = model->tokenize(real.turn_end, false, false);
    EXPECT_NE(std::search(tokens.begin(), tokens.end(), plain.begin(), plain.end()), tokens.end()) << real.name;
  }
}

TEST(ChatMarkers, AFirstTokenThatIsWrittenOutIsNotAddedAgain) {
  const auto model = Model::load(testing::model_file("gemma3"));
  ASSERT_GE(model->bos(), 0);
  const std::string bos = model->token_text(model->bos());
  EXPECT_EQ(model->tokenize(bos + "a tide", true, true), model->tokenize("a tide", true, true));
  EXPECT_GT(model->tokenize(bos + "a tide", true, false).size(), model->tokenize("a tide", true, false).size() + 1);
}

}  // namespace
}  // namespace kvmix
