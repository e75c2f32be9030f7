// kvmix report: plans and measurements of one model as a self-contained HTML page.
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "command.h"
#include "evaluation.h"
#include "kvmix/error.h"
#include "live_tokens.h"
#include "models.h"
#include "plan_view.h"
#include "subjects.h"
#include "svg.h"
#include "text.h"

namespace kvmix::app {
namespace {

struct Arguments {
  std::string model, profile, output = "report.html";
  std::vector<std::string> plans, curve, evals;
  std::string text;  // what token policies are shown on
  int64_t context = 2048;
  bool force = false;
};

constexpr int kStripColumns = 64;

struct NamedPlan {
  std::string name;
  Plan plan;
};

constexpr const char* kStyle =
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;color:#1a1a1a;background:#fff}"
    "h1{font-size:1.6em}h2{font-size:1.2em;margin-top:2.2em;border-bottom:1px solid #ddd}table{border-collapse:collapse}"
    "td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}"
    ".charts{display:flex;flex-wrap:wrap;gap:1.5em;margin-top:1.2em}figure{margin:0;flex:0 1 "
    "510px;min-width:0}svg{width:100%;height:auto}"
    ".legend{font-size:13px;margin:.2em 0}.legend span{margin-right:1.2em;white-space:nowrap}"
    ".legend i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}.heat{overflow-x:auto;margin-bottom:1.2em}"
    ".heat td{padding:0;width:26px;height:24px;text-align:center;font-size:12px;border:1px solid #fff}"
    ".heat th{padding:0 .4em;font-size:12px;font-weight:400;border:0}.note{color:#555}";

// Width to colour, light to dark; text turns white on the dark half.
std::string width_cell(int bits, const std::string& title) {
  const double t = std::min(1.0, std::log2(static_cast<double>(bits)) / 4.0);
  const auto mix = [t](int light, int dark) { return static_cast<int>(std::lround(light + t * (dark - light))); };
  return fmt::format("<td style=\"background:rgb({},{},{});color:{}\" title=\"{}\">{}</td>", mix(235, 8), mix(243, 48),
                     mix(251, 107), t > 0.45 ? "#fff" : "#000", html_escape(title), bits);
}

std::string heat_map(const std::vector<NamedPlan>& plans) {
  std::string out = "<div class=\"heat\"><table><tr><th></th><th></th>";
  for (size_t l = 0; l < plans.front().plan.layers.size(); ++l) out += fmt::format("<th>{}</th>", l);
  out += "</tr>";
  for (const NamedPlan& p : plans) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      out += fmt::format("<tr><th>{}</th><th>{}</th>", side == Side::kKey ? html_escape(p.name) : "",
                         side == Side::kKey ? "K" : "V");
      for (size_t l = 0; l < p.plan.layers.size(); ++l) {
        const SideConfig& config = side == Side::kKey ? p.plan.layers[l].key : p.plan.layers[l].value;
        out += width_cell(config.codec.bits, fmt::format("layer {}: {}{}", l, to_string(config.codec),
                                                         config.transform.hadamard ? " + Hadamard" : ""));
      }
      out += "</tr>";
    }
  }
  return out + "</table></div>";
}

std::string importance_chart(const Profile& profile) {
  Chart chart{"Gradient score by layer", "layer", "mean Frobenius norm", false, false, {}};
  for (const auto& [name, scores] : {std::pair{"key", &profile.key_score}, std::pair{"value", &profile.value_score}}) {
    Series series{name, {}, true, {}};
    for (size_t l = 0; l < scores->size(); ++l) series.points.emplace_back(static_cast<double>(l), (*scores)[l]);
    chart.series.push_back(std::move(series));
  }
  return "<figure>" + line_chart(chart) + "</figure>";
}

// What quantising one tensor alone costs: per metric the 2-bit codec, the width every profile has.
std::string sensitivity_charts(const Profile& profile) {
  std::vector<std::string> metrics;
  for (const auto& s : profile.sensitivities) {
    if (std::find(metrics.begin(), metrics.end(), s.metric) == metrics.end()) metrics.push_back(s.metric);
  }
  std::string out;
  for (const std::string& metric : metrics) {
    Chart chart{"Cost of 2 bits in one layer alone: " + metric, "layer", "nats per token", false, true, {}};
    if (metric == "output") chart.y_label = "relative error of the attention output";
    for (const Side side : {Side::kKey, Side::kValue}) {
      Series series{side == Side::kKey ? "key" : "value", {}, true, {}};
      std::vector<double> best(profile.key_score.size(), INFINITY);
      for (const auto& s : profile.sensitivities) {
        if (s.metric != metric || s.side != side || parse_codec(s.codec).bits != 2) continue;
        if (s.layer >= 0 && static_cast<size_t>(s.layer) < best.size()) {
          best[static_cast<size_t>(s.layer)] = std::min(best[static_cast<size_t>(s.layer)], s.cost);
        }
      }
      for (size_t l = 0; l < best.size(); ++l) series.points.emplace_back(static_cast<double>(l), best[l]);
      chart.series.push_back(std::move(series));
    }
    out += "<figure>" + line_chart(chart) + "</figure>";
  }
  return out;
}

std::string memory_chart(const std::vector<NamedPlan>& plans, const ModelShape& shape) {
  Chart chart{"Cache of one sequence", "tokens", "MiB", true, true, {}};
  const auto curve = [&](const std::string& name, const Plan& plan) {
    const CacheConfig config = cache_config(plan, shape);
    Series series{name, {}, true, {}};
    for (int64_t n = 256; n <= 131072; n *= 2) {
      series.points.emplace_back(static_cast<double>(n), static_cast<double>(predict_bytes(config, n)) / (1 << 20));
    }
    return series;
  };
  chart.series.push_back(curve("f16", f16_plan(shape)));
  for (const NamedPlan& p : plans) chart.series.push_back(curve(p.name, p.plan));
  return "<figure>" + line_chart(chart) + "</figure>";
}

// What planners expect of their plans, a line for each planner and metric.
std::string prediction_chart(const std::vector<NamedPlan>& plans, const ModelShape& shape) {
  constexpr int64_t kContext = 8192;
  Chart chart{"Predicted loss against size at " + std::to_string(kContext) + " tokens",
              "bits per element, all bytes",
              "sum of sensitivities, nats per token",
              true,
              true,
              {}};
  std::map<std::string, std::map<double, std::pair<double, std::string>>> lines;
  for (const NamedPlan& p : plans) {
    if (!p.plan.predicted) continue;
    lines[p.plan.planner + ", " + p.plan.predicted->metric][predict_bits_per_element(cache_config(p.plan, shape), kContext)] = {
        p.plan.predicted->cost, p.name};
  }
  for (const auto& [name, points] : lines) {
    Series series{name, {}, true, {}};
    for (const auto& [bits, cost] : points) {
      series.points.emplace_back(bits, cost.first);
      series.labels.push_back(cost.second);
    }
    chart.series.push_back(std::move(series));
  }
  return lines.empty() ? "" : "<figure>" + line_chart(chart) + "</figure>";
}

std::string page(const ModelShape& shape, const std::vector<NamedPlan>& plans, const std::vector<NamedPlan>& curve,
                 const Profile* profile, const std::vector<Evaluation>& evaluations, const std::vector<LiveTokens>& live) {
  std::string out = "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>KVmix: " + html_escape(shape.name) +
                    "</title><meta name=\"viewport\" content=\"width=device-width\"><style>" + kStyle + chart_style() +
                    "</style></head><body>";
  out += fmt::format("<h1>{}</h1><p class=\"note\">{} layers, {} architecture, fingerprint {}</p>", html_escape(shape.name),
                     shape.layers.size(), html_escape(shape.architecture), html_escape(shape.fingerprint));
  if (!plans.empty()) {
    out +=
        "<h2>Plans</h2><p>Code width of keys (K) and values (V) by layer; point at a cell for the codec.</p>" + heat_map(plans);
    out += "<table><tr><th>plan</th><th>planner</th><th>keeps</th><th>bits at 4K</th><th>at 8K</th><th>at 32K</th></tr>";
    for (const NamedPlan& p : plans) {
      const CacheConfig config = cache_config(p.plan, shape);
      out += fmt::format("<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.2f}</td><td>{:.2f}</td><td>{:.2f}</td></tr>",
                         html_escape(p.name), html_escape(p.plan.planner), html_escape(policies_text(p.plan, &shape)),
                         predict_bits_per_element(config, 4096), predict_bits_per_element(config, 8192),
                         predict_bits_per_element(config, 32768));
    }
    out += "</table><div class=\"charts\">" + memory_chart(plans, shape) + "</div>";
  }
  if (!curve.empty()) out += "<h2>All budgets</h2><div class=\"charts\">" + prediction_chart(curve, shape) + "</div>";
  if (profile != nullptr) {
    out += "<h2>Importance of layers</h2><div class=\"charts\">" + importance_chart(*profile) + sensitivity_charts(*profile) +
           "</div>";
  }
  if (!live.empty())
    out += "<h2>Tokens that stay</h2><p>A line a KV head, the text from left to right; darker where more stay.</p>";
  for (const LiveTokens& tokens : live) {
    out += "<pre style=\"line-height:1.1;overflow-x:auto\">" + html_escape(live_table(tokens, kStripColumns)) + "</pre>";
  }
  if (!evaluations.empty()) out += "<h2>Quality</h2>" + quality_section(evaluations);
  return out + "</body></html>\n";
}

}  // namespace

void add_report(CommandContext& context) {
  auto arguments = std::make_shared<Arguments>();
  CLI::App* command =
      add_command(context, "report", "Plans and measurements as a self-contained HTML page",
                  "kvmix report smollm2 --plan plan.json --profile profile.json --eval eval.json -o report.html");
  command->add_option("model", arguments->model, kModelHelp)->required();
  command->add_option("--plan", arguments->plans, "A plan to show (repeatable)");
  command->add_option("--pareto", arguments->curve,
                      "Plans of a curve, as kvmix plan --pareto writes them: predicted loss by size");
  command->add_option("--profile", arguments->profile, "The profile whose scores and sensitivities to show");
  command->add_option("--eval", arguments->evals, "Output of kvmix eval --json (repeatable)");
  auto* text = command->add_option("--text", arguments->text,
                                   "Text that plans with a token policy are shown on: which positions stay, by layer and head");
  command->add_option("--context", arguments->context, "--text: its first so many tokens, as a prompt")
      ->check(CLI::Range(int64_t{16}, int64_t{1} << 24))
      ->capture_default_str()
      ->needs(text);
  command->add_option("-o,--output", arguments->output, "The page to write")->capture_default_str();
  command->add_flag("--force", arguments->force, "Accept plans of another model of the same shape");
  command->callback([&context, arguments] {
    context.action = [arguments](const Common& common) {
      if (arguments->plans.empty() && arguments->curve.empty() && arguments->profile.empty() && arguments->evals.empty()) {
        throw UsageError("nothing to show: give --plan, --pareto, --profile or --eval");
      }
      const auto model = load_model(arguments->model);
      const auto named = [&](const std::vector<std::string>& files) {
        std::vector<NamedPlan> plans;
        for (const std::string& file : files) {
          const std::string stem = file.substr(file.find_last_of('/') + 1);
          plans.push_back({stem.substr(0, stem.rfind(".json")), resolve_plan(file, *model, arguments->force)});
        }
        return plans;
      };
      const std::vector<NamedPlan> plans = named(arguments->plans), curve = named(arguments->curve);
      std::unique_ptr<Profile> profile;
      if (!arguments->profile.empty()) {
        profile = std::make_unique<Profile>(read_profile(arguments->profile));
        check_profile(*profile, model->shape(), arguments->force, arguments->profile);
      }
      std::vector<Evaluation> evaluations;
      for (const std::string& file : arguments->evals) {
        evaluations.push_back(parse_evaluation(read_text_file(file), file));
        check_evaluation(evaluations.back(), model->shape(), arguments->force, file);
      }
      std::vector<LiveTokens> live;
      if (!arguments->text.empty()) {
        std::vector<Token> tokens = model->tokenize(read_text_file(arguments->text), true);
        const int64_t most = std::min(arguments->context, model->shape().context_tokens);
        tokens.resize(std::min(tokens.size(), static_cast<size_t>(most)));
        for (const NamedPlan& p : plans) {
          if (p.plan.tokens) live.push_back(live_tokens(model, p.name, p.plan, tokens, common.threads, arguments->force));
        }
        if (live.empty()) {
          throw Error(Status::kInvalidArgument,
                      "--text shows what token policies keep, and no --plan has one; give a plan with "
                      "\"tokens\", or leave --text out");
        }
      }
      const std::string html = page(model->shape(), plans, curve, profile.get(), evaluations, live);
      write_file_atomically(arguments->output, html);
      if (common.json) {
        nlohmann::json json{{"output", arguments->output}, {"bytes", html.size()}};
        for (const LiveTokens& tokens : live) json["live"].push_back(live_json(tokens));
        fmt::print("{}\n", json.dump());
      } else if (!common.quiet) {
        for (const LiveTokens& tokens : live) fmt::print("{}\n", live_table(tokens, kStripColumns));
        fmt::print("wrote {} ({})\n", arguments->output, human_bytes(static_cast<double>(html.size())));
      }
      return kExitOk;
    };
  });
}

}  // namespace kvmix::app
