// Plans and profiles as tables for a person.
#pragma once

#include <nlohmann/json.hpp>

#include "kvmix/engine.h"
#include "kvmix/plan.h"

namespace kvmix::app {

// Which tokens and key channels stay: "all", or the plan's policies, with the channels of the model's heads.
std::string policies_text(const Plan& plan, const ModelShape* model);
// Layer by layer: scores as bars where a profile is given, codecs, widths as bars.
void print_plan_table(const Plan& plan, const Profile* profile);
void print_score_table(const Profile& profile);
// What the plan costs on a model: bytes and bits at a few context lengths, against fp16.
void print_plan_costs(const Plan& plan, const ModelShape& model);
nlohmann::json plan_costs_json(const Plan& plan, const ModelShape& model);

// Part of a side's numbers that a plan's latents are: 1 where layers store rows themselves.
double kept_latents(const Plan& plan, const ModelShape& model, Side side);
// Layer by layer: latents of keys and values, in how many groups.
void print_factors_table(const FactorsInfo& factors);
nlohmann::json factors_json(const FactorsInfo& factors);
// Latents of all channels.
double kept_share(const FactorsInfo& factors);

// Mean code bits over layers and heads of equal size.
double mean_bits(const Plan& plan, Side side);

}  // namespace kvmix::app
