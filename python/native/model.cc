// GGUF models: their tokens, and text from them.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>

#include "arrays.h"
#include "kvmix/engine.h"
#include "module.h"

namespace kvmix::python {
namespace {

using namespace nb::literals;

// nanobind holds no pointers to const.
struct PythonModel {
  std::shared_ptr<const Model> model;
};

EngineOptions options_of(int threads, const std::string& kernel, bool exact, bool force) {
  EngineOptions options;
  options.threads = threads;
  options.kernel = kernel;
  options.exact = exact;
  options.force_plan = force;
  return options;
}

nb::ndarray<nb::numpy, float> logits(const PythonModel& m, const std::vector<Token>& tokens, const std::optional<Plan>& plan,
                                     int threads, const std::string& kernel, bool exact, bool force) {
  if (tokens.empty()) refuse("tokens is empty; give at least one");
  const int vocab = m.model->vocab_size();
  for (const Token t : tokens) {
    if (t < 0 || t >= vocab) refuse("token " + std::to_string(t) + " is not in the vocabulary of " + std::to_string(vocab));
  }
  std::vector<float> all;
  run_long(nb::none(), [&](const Progress& progress) {
    Engine engine(m.model, plan ? *plan : f16_plan(m.model->shape()), options_of(threads, kernel, exact, force));
    const SequenceId sequence = engine.cache().create();
    const auto n = static_cast<int64_t>(tokens.size());
    for (int64_t at = 0; at < n; at += kPageTokens) {
      if (!progress(static_cast<double>(at), static_cast<double>(n), "logits"))
        throw Error(Status::kCancelled, "stopped on request");
      const int64_t count = std::min<int64_t>(kPageTokens, n - at);
      const EngineItem item{.sequence = sequence,
                            .tokens = std::span(tokens).subspan(static_cast<size_t>(at), static_cast<size_t>(count)),
                            .all_logits = true,
                            .more = at + count < n};
      const std::span<const float> rows = engine.step({&item, 1});
      all.insert(all.end(), rows.begin(), rows.end());
    }
  });
  return as_numpy(std::move(all), {tokens.size(), static_cast<size_t>(vocab)});
}

// A model may say anything: bytes that are no UTF-8 become U+FFFD.
nb::object text_of(std::string_view bytes) {
  return nb::steal(PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

nb::object generate_text(const PythonModel& m, const std::vector<Token>& prompt, const std::optional<Plan>& plan,
                         int max_tokens, float temperature, uint64_t seed, const nb::object& on_text, int threads, bool force) {
  GenerateOptions options;
  options.max_tokens = max_tokens;
  options.sampling.temperature = temperature;
  options.sampling.seed = seed;
  GenerateResult result;
  run_long(nb::none(), [&](const Progress& progress) {
    Engine engine(m.model, plan ? *plan : f16_plan(m.model->shape()), options_of(threads, "", false, force));
    result = generate(engine, engine.cache().create(), prompt, options, [&](std::string_view text) {
      if (!progress(0, 0, "")) return false;
      if (on_text.is_none()) return true;
      const nb::gil_scoped_acquire lock;
      const nb::object more = on_text(text_of(text));
      return more.is_none() || nb::cast<bool>(more);
    });
  });
  return text_of(result.text);
}

}  // namespace

const std::shared_ptr<const Model>& model_of(nb::handle object) { return nb::cast<PythonModel&>(object).model; }

void bind_model(nb::module_& m) {
  nb::class_<PythonModel>(m, "Model", "A GGUF model: weights as stored, tokenizer and shape. Immutable; threads may share it.")
      .def(
          "__init__",
          [](PythonModel* self, const nb::object& path) {
            const auto text = nb::cast<std::string>(nb::module_::import_("os").attr("fspath")(path));
            const nb::gil_scoped_release unlocked;
            new (self) PythonModel{Model::load(text)};
          },
          "path"_a,
          "Raises NotFoundError, CorruptError naming the field, or UnsupportedError naming the architectures there are.")
      .def_prop_ro("shape", [](const PythonModel& p) { return p.model->shape(); })
      .def_prop_ro("path", [](const PythonModel& p) { return p.model->path(); })
      .def_prop_ro("weight_bytes", [](const PythonModel& p) { return p.model->weight_bytes(); })
      .def_prop_ro("vocab_size", [](const PythonModel& p) { return p.model->vocab_size(); })
      .def_prop_ro(
          "bos", [](const PythonModel& p) { return p.model->bos(); }, "-1 if the model has none.")
      .def(
          "tokenize",
          [](const PythonModel& p, const std::string& text, bool add_bos, bool special) {
            return p.model->tokenize(text, add_bos, special);
          },
          "text"_a, nb::kw_only(), "add_bos"_a = true, "special"_a = false,
          "Tokens of a text. `special` parses control tokens that it spells out; `add_bos` where the model wants one.")
      .def(
          "detokenize",
          [](const PythonModel& p, const std::vector<Token>& tokens) {
            return nb::bytes(p.model->detokenize(tokens).c_str(), p.model->detokenize(tokens).size());
          },
          "tokens"_a, "Bytes, since a token may be part of a character.")
      .def(
          "chat_tokens",
          [](const PythonModel& p, const std::vector<std::pair<std::string, std::string>>& messages) {
            std::vector<ChatMessage> list;
            for (const auto& [role, content] : messages) list.push_back({role, content});
            return p.model->chat_tokens(list, p.model->chat_template());
          },
          "messages"_a, "[(role, content), ...] in the words of the model's chat template, up to where the answer starts.")
      .def("logits", &logits, "tokens"_a, "plan"_a = nb::none(), nb::kw_only(), "threads"_a = 0, "kernel"_a = "",
           "exact"_a = false, "force"_a = false,
           "float32 [tokens, vocab_size]: the model's logits with a cache of this plan (None: f16), in chunks of 128 tokens.\n"
           "Raises MismatchError for another model's plan, InvalidArgumentError beyond the model's context.")
      .def("generate", &generate_text,
           nb::sig(
               "def generate(self, prompt: collections.abc.Sequence[int], plan: Plan | None = None, *, max_tokens: int = 256, "
               "temperature: float = 0.8, seed: int = 0, on_text: object | None = None, threads: int = 0, force: bool = False) "
               "-> str"),
           "prompt"_a, "plan"_a = nb::none(), nb::kw_only(), "max_tokens"_a = 256, "temperature"_a = 0.8f, "seed"_a = 0,
           "on_text"_a = nb::none(), "threads"_a = 0, "force"_a = false,
           "Text that continues the prompt's tokens; bytes that are no UTF-8 become U+FFFD. on_text(text) is called as it "
           "comes;\n"
           "what it returns, if not None, says whether to go on. temperature 0: the likeliest token.")
      .def("__repr__", [](const PythonModel& p) { return "Model('" + p.model->path() + "')"; });
}

}  // namespace kvmix::python
