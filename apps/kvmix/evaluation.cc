#include "evaluation.h"

#include <fmt/core.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "kvmix/error.h"
#include "svg.h"

namespace kvmix::app {
namespace {

constexpr double kMostTokens = 1e9, kMostNats = 1e6, kMostPerplexity = 1e300, kMostBits = 1e6;

class Reader {
 public:
  explicit Reader(const std::string& name) : name_(name) {}

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(Status::kCorrupt, name_ + ": " + what + "; give a file written by kvmix eval --json");
  }
  std::string text(const nlohmann::json& object, const char* key, const std::string& where) const {
    if (!object.is_object() || !object.contains(key) || !object[key].is_string()) fail(where + " has no \"" + key + "\"");
    return object[key];
  }
  double number(const nlohmann::json& value, const std::string& what, double low, double high) const {
    if (!value.is_number() || !(value.get<double>() >= low && value.get<double>() <= high))
      fail(what + " is " + value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace).substr(0, 40) +
           ", not a number from " + fmt::format("{:g} to {:g}", low, high));
    return value;
  }

  EvalRow row(const nlohmann::json& value, const std::string& where) const {
    EvalRow row;
    row.name = text(value, "name", where);
    if (value.contains("lost")) {
      row.lost = text(value, "lost", where);
      return row;
    }
    const auto field = [&](const char* key, double low, double high) {
      if (!value.contains(key)) fail(where + " (" + row.name.substr(0, 40) + ") has no \"" + key + "\"");
      return number(value[key], where + "." + key, low, high);
    };
    row.bits_per_element = field("bits_per_element", 0, kMostBits);
    row.perplexity = field("perplexity", 0, kMostPerplexity);
    row.kl_mean = field("kl_mean", -kMostNats, kMostNats);
    row.top1 = field("top1", 0, 1);
    if (!value.contains("kl_by_position")) return row;
    const std::string along = where + ".kl_by_position";
    if (!value["kl_by_position"].is_array()) fail(along + " is no list");
    for (const auto& point : value["kl_by_position"]) {
      if (!point.is_array() || point.size() != 2) fail(along + " has an entry that is no pair");
      row.kl_by_position.emplace_back(static_cast<int64_t>(number(point[0], along, 0, kMostTokens)),
                                      number(point[1], along, -kMostNats, kMostNats));
    }
    return row;
  }

 private:
  const std::string& name_;
};

}  // namespace

Evaluation parse_evaluation(const std::string& text, const std::string& name) {
  const Reader reader(name);
  const nlohmann::json root = nlohmann::json::parse(text, nullptr, false);
  if (!root.is_object()) reader.fail("it is no JSON object");
  if (!root.contains("rows") || !root["rows"].is_array()) reader.fail("it has no list \"rows\"");
  Evaluation evaluation{reader.text(root, "model", "it"), reader.text(root, "fingerprint", "it"), {}};
  for (size_t i = 0; i < root["rows"].size(); ++i) {
    EvalRow row = reader.row(root["rows"][i], "rows[" + std::to_string(i) + "]");
    if (row.lost.empty()) evaluation.rows.push_back(std::move(row));
  }
  return evaluation;
}

void check_evaluation(const Evaluation& evaluation, const ModelShape& model, bool force, const std::string& name) {
  if (evaluation.fingerprint == model.fingerprint || force) return;
  throw Error(Status::kMismatch, name + " was measured on " + other_model(evaluation.model, evaluation.fingerprint, model) +
                                     ": evaluate this one with kvmix eval --json, or pass --force");
}

std::string quality_section(const std::vector<Evaluation>& evaluations) {
  Chart pareto{"Divergence against size", "bits per element, all bytes", "mean KL to f16, nats per token", false, true, {}};
  Chart position{"Divergence along the window", "position", "mean KL to f16, nats per token", false, true, {}};
  Series ours{"kvmix", {}, false, {}}, peers{"llama.cpp", {}, false, {}};
  std::string table =
      "<table><tr><th>cache</th><th>bits per element</th><th>perplexity</th><th>mean KL</th><th>top-1 agreement</th></tr>";
  for (const Evaluation& e : evaluations) {
    for (const EvalRow& row : e.rows) {
      Series& series = row.name.starts_with("llama.cpp") ? peers : ours;
      series.points.emplace_back(row.bits_per_element, row.kl_mean);
      series.labels.push_back(row.name);
      table += fmt::format("<tr><td>{}</td><td>{:.2f}</td><td>{:.3f}</td><td>{:.5f}</td><td>{:.2f} %</td></tr>",
                           html_escape(row.name), row.bits_per_element, row.perplexity, row.kl_mean, 100 * row.top1);
      if (row.kl_by_position.empty() || row.kl_mean <= 0) continue;
      Series along{row.name, {}, true, {}};
      for (const auto& [at, kl] : row.kl_by_position) along.points.emplace_back(static_cast<double>(at), kl);
      position.series.push_back(std::move(along));
    }
  }
  pareto.series = {ours, peers};
  std::string out = table + "</table><div class=\"charts\"><figure>" + line_chart(pareto) + "</figure>";
  if (!position.series.empty()) out += "<figure>" + line_chart(position) + "</figure>";
  return out + "</div>";
}

}  // namespace kvmix::app
