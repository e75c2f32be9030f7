// GGUF files from anybody, through the loader: header, metadata, tensor list, tokenizer. Inputs are a file's header; zeros
// stand behind it where a file has its weights, so that inputs are short.
#include "engine/model.h"
#include "fuzz/memory_file.h"
#include "fuzz/target.h"
#include "kvmix/error.h"
#include "support/tiny_model.h"

namespace kvmix {
namespace {

constexpr size_t kWeightBytes = size_t{8} << 20;  // of the largest tiny model

bool accepts(const std::string& input) {
  const fuzz::MemoryFile file(input, kWeightBytes);
  try {
    const auto model = Model::load(file.path());
    const std::vector<Token> tokens = model->tokenize("a tale of a \xc3\xa9 and \xff <s>", true, true);
    model->detokenize(tokens);
    gguf_model(*model).weights();
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::vector<fuzz::Seed> seeds() {
  const testing::TemporaryFolder folder("kvmix-fuzz");
  std::vector<fuzz::Seed> out;
  for (testing::TinyModel tiny : testing::tiny_models()) {
    tiny.layers = std::min(tiny.layers, static_cast<int>(std::max<size_t>(1, tiny.pattern.size())));
    const std::string path = folder.file("tiny.gguf");
    testing::write_tiny_model(tiny, path);
    const std::unique_ptr<gguf_context, Freer<gguf_free>> gguf(gguf_init_from_file(path.c_str(), {true, nullptr}));
    out.push_back(fuzz::whole(testing::read_bytes(path).substr(0, gguf_get_data_offset(gguf.get()))));
  }
  return out;
}

const fuzz::Registered registered({"gguf", seeds, accepts, 3000});

}  // namespace
}  // namespace kvmix
