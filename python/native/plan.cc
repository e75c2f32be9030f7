// Shapes, plans and profiles.
#include "kvmix/plan.h"

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <filesystem>
#include <tuple>

#include "arrays.h"
#include "kvmix/policy.h"
#include "module.h"

namespace kvmix::python {
namespace {

using namespace nb::literals;

std::string path_text(const nb::object& path) { return nb::cast<std::string>(nb::module_::import_("os").attr("fspath")(path)); }

Plan uniform(const ModelShape& shape, int key_bits, int value_bits, const std::map<std::string, std::string>& options) {
  PlannerRequest request;
  request.model = &shape;
  request.options = options;
  request.options["k-bits"] = std::to_string(key_bits);
  request.options["v-bits"] = std::to_string(value_bits);
  return make_plan("uniform", request);
}

std::vector<std::pair<std::string, std::string>> layer_codecs(const Plan& plan) {
  std::vector<std::pair<std::string, std::string>> list;
  for (const Plan::Layer& layer : plan.layers) list.emplace_back(to_string(layer.key.codec), to_string(layer.value.codec));
  return list;
}

Plan with_tokens(const Plan& plan, const std::optional<std::string>& policy) {
  Plan result = plan;
  result.tokens = policy ? std::optional(parse_policy(*policy)) : std::nullopt;
  if (policy) result.note += "; tokens " + to_string(*result.tokens);
  return result;
}

void check_layers(const Plan& plan, const ModelShape& shape) { check_plan(plan, shape, true); }

// Of gradient norms that another program measured, [prompt][layer].
Profile profile_of_scores(const ModelShape& shape, std::vector<std::vector<double>> keys,
                          std::vector<std::vector<double>> values, int64_t tokens, uint64_t seed) {
  if (keys.empty() || keys.size() != values.size())
    refuse("scores of " + std::to_string(keys.size()) + " and " + std::to_string(values.size()) +
           " prompts; expected as many of keys as of values, at least 1");
  const size_t layers = shape.layers.size();
  Profile profile;
  profile.fingerprint = shape.fingerprint;
  profile.model = shape.name;
  profile.seed = seed;
  profile.prompts = static_cast<int>(keys.size());
  profile.tokens = tokens;
  profile.fp16 = usual_fp16_part(shape);
  const auto mean = [&](const std::vector<std::vector<double>>& rows) {
    std::vector<double> sums(layers, 0);
    for (const auto& row : rows) {
      if (row.size() != layers)
        refuse("a prompt has scores of " + std::to_string(row.size()) + " layers, the model " + std::to_string(layers));
      for (size_t l = 0; l < layers; ++l) sums[l] += row[l] / static_cast<double>(rows.size());
    }
    return sums;
  };
  profile.key_score = mean(keys);
  profile.value_score = mean(values);
  profile.key_score_by_prompt = std::move(keys);
  profile.value_score_by_prompt = std::move(values);
  return parse_profile(to_json(profile), "the scores");  // checked as a file's are
}

void bind_shape(nb::module_& m) {
  nb::class_<ModelShape::Layer>(m, "LayerShape", "Attention of one layer, as plans and caches need to know it.")
      .def(
          "__init__",
          [](ModelShape::Layer* self, int q_heads, int kv_heads, int head_dim, int sliding_window, std::optional<float> scale,
             float softcap) {
            new (self) ModelShape::Layer{q_heads,
                                         kv_heads,
                                         head_dim,
                                         sliding_window,
                                         scale.value_or(head_dim > 0 ? 1.0f / std::sqrt(static_cast<float>(head_dim)) : 0),
                                         softcap,
                                         {},
                                         {}};
          },
          "q_heads"_a, "kv_heads"_a, "head_dim"_a, nb::kw_only(), "sliding_window"_a = 0, "scale"_a = nb::none(),
          "softcap"_a = 0.0f,
          "q_heads is a multiple of kv_heads; head_dim 32 to 256, a multiple of 16. sliding_window in tokens, 0: none: a query "
          "at\n"
          "position p sees keys in (p - sliding_window, p]. scale of q.k, None: head_dim ** -0.5; softcap in logits, 0: none.")
      .def_ro("q_heads", &ModelShape::Layer::q_heads)
      .def_ro("kv_heads", &ModelShape::Layer::kv_heads)
      .def_ro("head_dim", &ModelShape::Layer::head_dim)
      .def_ro("sliding_window", &ModelShape::Layer::sliding_window)
      .def_ro("scale", &ModelShape::Layer::scale)
      .def_ro("softcap", &ModelShape::Layer::softcap)
      .def("__repr__", [](const ModelShape::Layer& l) {
        return "LayerShape(q_heads=" + std::to_string(l.q_heads) + ", kv_heads=" + std::to_string(l.kv_heads) +
               ", head_dim=" + std::to_string(l.head_dim) + ", sliding_window=" + std::to_string(l.sliding_window) + ")";
      });
  nb::class_<ModelShape>(m, "ModelShape", "The part of a model that plans depend on.")
      .def(
          "__init__",
          [](ModelShape* self, std::vector<ModelShape::Layer> layers, std::string name, std::string fingerprint,
             std::string architecture, int64_t context_tokens) {
            new (self)
                ModelShape{std::move(name), std::move(architecture), std::move(fingerprint), std::move(layers), context_tokens};
          },
          "layers"_a, nb::kw_only(), "name"_a = "", "fingerprint"_a = "", "architecture"_a = "", "context_tokens"_a = 0,
          "fingerprint tells models apart: plans and saved caches are refused by another one.")
      .def_ro("name", &ModelShape::name)
      .def_ro("architecture", &ModelShape::architecture)
      .def_ro("fingerprint", &ModelShape::fingerprint)
      .def_ro("layers", &ModelShape::layers)
      .def_ro("context_tokens", &ModelShape::context_tokens)
      .def("__repr__",
           [](const ModelShape& s) { return "ModelShape('" + s.name + "', " + std::to_string(s.layers.size()) + " layers)"; });
}

void bind_plan_class(nb::module_& m) {
  nb::class_<Plan>(m, "Plan", "What a cache does: per layer and side the codec and its transforms, and what stays in fp16.")
      .def_static(
          "read", [](const nb::object& path) { return read_plan(path_text(path)); }, "path"_a,
          "A plan file, checked. Raises NotFoundError, or CorruptError naming file, field, value and remedy.")
      .def_static("from_json", &parse_plan, "text"_a, "name"_a = "the plan",
                  "The same from text; `name` stands for the file in errors.")
      .def_static("f16", &f16_plan, "shape"_a, "Everything in fp16: the cache that others are compared with.")
      .def_static("uniform", &uniform, "shape"_a, "key_bits"_a, "value_bits"_a,
                  "options"_a = std::map<std::string, std::string>{},
                  "The same bits (1, 2, 3, 4, 5, 6, 8 or 16) in every layer; `options` are those of the planner `uniform`.")
      .def(
          "to_json", [](const Plan& p) { return to_json(p); }, "The text of a plan file.")
      .def(
          "write", [](const Plan& p, const nb::object& path) { write_plan(p, path_text(path)); }, "path"_a,
          "Writes a plan file: to a temporary that is renamed. Raises FileError.")
      .def("with_tokens", &with_tokens, "policy"_a.none(), nb::sig("def with_tokens(self, policy: str | None) -> Plan"),
           "The same plan with a token policy, spelled as in \"snapkv keep=0.25 window=32\", in place of its own; None: "
           "without.\n"
           "Raises InvalidArgumentError naming the policy or parameter.")
      .def("check", &check_plan, "shape"_a, "force"_a = false, "name"_a = "the plan",
           "Raises MismatchError unless the plan was made for this model, or `force` and as many layers.")
      .def(
          "bytes",
          [](const Plan& p, const ModelShape& shape, int64_t tokens, int64_t prompt_tokens) {
            check_layers(p, shape);
            return predict_bytes(cache_config(p, shape), tokens, prompt_tokens);
          },
          "shape"_a, "tokens"_a, "prompt_tokens"_a = -1, "Bytes that a sequence of `tokens` takes, everything included.")
      .def(
          "bits_per_element",
          [](const Plan& p, const ModelShape& shape, int64_t tokens) {
            check_layers(p, shape);
            return predict_bits_per_element(cache_config(p, shape), tokens);
          },
          "shape"_a, "tokens"_a, "Bits per number of K and V, all bytes of a sequence of `tokens` included.")
      .def_ro("model", &Plan::model)
      .def_ro("fingerprint", &Plan::fingerprint, "Of the model that it was made for.")
      .def_ro("planner", &Plan::planner)
      .def_ro("note", &Plan::note)
      .def_ro("sinks", &Plan::sinks, "First tokens that stay in fp16.")
      .def_prop_ro(
          "window", [](const Plan& p) { return p.window.tokens; }, "Newest tokens that are not packed yet.")
      .def_prop_ro(
          "recent", [](const Plan& p) { return to_string(p.recent); }, "Codec of those newest tokens.")
      .def_prop_ro("layers", &layer_codecs, "Codecs of keys and values, by layer: (\"int3.channel.g128.fitted.zero\", ...).")
      .def_prop_ro(
          "tokens", [](const Plan& p) { return p.tokens ? std::optional(to_string(*p.tokens)) : std::nullopt; },
          nb::sig("def tokens(self) -> str | None"), "The token policy with its parameters; None keeps all tokens.")
      .def_prop_ro(
          "channels", [](const Plan& p) { return p.channels ? std::optional(to_string(*p.channels)) : std::nullopt; },
          nb::sig("def channels(self) -> str | None"), "The policy that chooses channels of keys; None keeps all.")
      .def_prop_ro(
          "predicted",
          [](const Plan& p) {
            return p.predicted ? std::optional(std::pair(p.predicted->metric, p.predicted->cost)) : std::nullopt;
          },
          nb::sig("def predicted(self) -> tuple[str, float] | None"), "Metric and expected cost, by the profile.")
      .def("__repr__", [](const Plan& p) { return "Plan('" + p.note + "', for '" + p.model + "')"; });
}

void bind_profile(nb::module_& m) {
  nb::class_<Profile>(m, "Profile", "What was measured on a model once, for planners.")
      .def_static(
          "read", [](const nb::object& path) { return read_profile(path_text(path)); }, "path"_a,
          "A profile file, checked. Raises NotFoundError, or CorruptError naming file, field, value and remedy.")
      .def_static("from_json", &parse_profile, "text"_a, "name"_a = "the profile")
      .def_static("from_scores", &profile_of_scores, "shape"_a, "key_scores"_a, "value_scores"_a, "tokens"_a, "seed"_a = 0,
                  "Of gradient norms that were measured elsewhere, [prompts][layers]; `tokens` of all prompts together.")
      .def("to_json", [](const Profile& p) { return to_json(p); })
      .def(
          "write", [](const Profile& p, const nb::object& path) { write_profile(p, path_text(path)); }, "path"_a)
      .def("check", &check_profile, "shape"_a, "force"_a = false, "name"_a = "the profile")
      .def_ro("model", &Profile::model)
      .def_ro("fingerprint", &Profile::fingerprint)
      .def_ro("prompts", &Profile::prompts)
      .def_ro("tokens", &Profile::tokens)
      .def_ro("seed", &Profile::seed)
      .def_ro("key_score", &Profile::key_score, "Mean over prompts of the gradient norm of W_k, one number per layer.")
      .def_ro("value_score", &Profile::value_score)
      .def_prop_ro(
          "sensitivities",
          [](const Profile& p) {
            std::vector<std::tuple<std::string, int, std::string, std::string, std::string, double>> rows;
            for (const Profile::Sensitivity& s : p.sensitivities) {
              rows.emplace_back(s.metric, s.layer, s.side == Side::kKey ? "key" : "value", s.codec, s.transform, s.cost);
            }
            return rows;
          },
          "(metric, layer, side, codec, transform, cost): cost in nats per token of quantising that side of that layer alone.")
      .def("__repr__", [](const Profile& p) {
        return "Profile('" + p.model + "', " + std::to_string(p.prompts) + " prompts, " +
               std::to_string(p.sensitivities.size()) + " sensitivities)";
      });
}

}  // namespace

void bind_plan(nb::module_& m) {
  bind_shape(m);
  bind_plan_class(m);
  bind_profile(m);
  m.def(
      "planners",
      [] {
        std::vector<std::pair<std::string, std::string>> list;
        for (const PlannerInfo& info : planners()) list.emplace_back(info.name, info.description);
        return list;
      },
      "Names and descriptions of the planners that plan() takes.");
  m.def(
      "codecs",
      [] {
        std::vector<std::string> list = {"f16"};
        for (const CodecSpec& spec : all_codec_specs()) list.push_back(to_string(spec));
        return list;
      },
      "Every codec by its spelling.");
  m.def(
      "make_plan",
      [](const ModelShape& shape, const std::optional<Profile>& profile, const std::string& planner, double bits, size_t bytes,
         int64_t context, int sequences, const std::map<std::string, std::string>& options) {
        PlannerRequest request;
        request.model = &shape;
        request.profile = profile ? &*profile : nullptr;
        request.budget = {bits, bytes, sequences, context, bytes > 0};
        request.options = options;
        if (profile) check_profile(*profile, shape, false);
        const nb::gil_scoped_release unlocked;
        return make_plan(planner, request);
      },
      "shape"_a, "profile"_a, "planner"_a, "bits"_a, "bytes"_a, "context"_a, "sequences"_a, "options"_a);
}

}  // namespace kvmix::python
