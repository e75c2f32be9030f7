#include "engine/factors_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/checksum.h"
#include "base/file.h"
#include "engine/library_call.h"
#include "engine/model.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr const char* kKind = "kvmix-factors";
constexpr int64_t kVersion = 1, kMostLayers = 1024, kMostHeads = 1024, kMostRank = 65536;

std::string tensor_name(size_t layer, Side side, const char* what) {
  return "blk." + std::to_string(layer) + (side == Side::kKey ? ".key." : ".value.") + what;
}

class FactorsReader {
 public:
  explicit FactorsReader(const std::string& path) : path_(path), file_(path), metadata_(file_.metadata(), path) {}

  Factors read() {
    if (metadata_.text_or("general.architecture", "") != kKind)
      throw Error(Status::kCorrupt, path_ + " is no factors file; give one that kvmix factorise wrote");
    if (const int64_t version = metadata_.integer("kvmix.version", 0, INT32_MAX); version != kVersion) {
      throw Error(Status::kUnsupported, path_ + ": factors of version " + std::to_string(version) + "; this build reads " +
                                            std::to_string(kVersion) + ", factorise the model again");
    }
    Factors f;
    f.method = metadata_.text("kvmix.method");
    f.note = metadata_.text("kvmix.note");
    f.model = metadata_.text("kvmix.model");
    f.fingerprint = metadata_.text("kvmix.fingerprint");
    f.checksum = metadata_.text("kvmix.checksum");
    const auto layers = static_cast<size_t>(metadata_.integer("kvmix.layers", 1, kMostLayers));
    for (size_t l = 0; l < layers; ++l) f.layers.push_back({side(l, Side::kKey), side(l, Side::kValue)});
    if (f.checksum != std::to_string(sum_.value())) fail("its checksum does not match its numbers");
    return f;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(Status::kCorrupt, path_ + ": damaged factors file: " + what + "; factorise the model again");
  }
  // A tensor's rows and columns, as floats.
  std::vector<float> numbers(size_t layer, Side which, const char* what, int64_t& columns, int64_t& rows) {
    const std::string name = tensor_name(layer, which, what);
    const auto& all = file_.tensors();
    const auto found = std::find_if(all.begin(), all.end(), [&](const GgufFile::Tensor& t) { return t.name == name; });
    if (found == all.end()) fail("tensor " + name + " is missing");
    if (found->shape->type != GGML_TYPE_F32 || found->shape->ne[2] != 1 || found->shape->ne[3] != 1)
      fail("tensor " + name + " is no fp32 matrix");
    columns = found->shape->ne[0];
    rows = found->shape->ne[1];
    std::vector<float> out(found->bytes / sizeof(float));
    std::memcpy(out.data(), found->data, out.size() * sizeof(float));
    if (!all_finite(out)) fail("tensor " + name + " has numbers that are not finite");
    sum_.update(out.data(), out.size() * sizeof(float));
    return out;
  }
  SideFactors side(size_t layer, Side which) {
    SideFactors s;
    int64_t dim = 0, latents = 0, rank = 0, outputs = 0, each = 0, groups = 0, heads = 0, one = 0;
    s.down = numbers(layer, which, "down", dim, latents);
    s.up = numbers(layer, which, "up", rank, outputs);
    s.energies = numbers(layer, which, "energies", each, groups);
    const std::vector<float> group_of = numbers(layer, which, "groups", heads, one);
    const std::string where = tensor_name(layer, which, "");
    if (one != 1 || heads < 1 || heads > kMostHeads || groups < 1 || heads % groups != 0 || outputs % heads != 0)
      fail(where + "groups has a shape that does not fit");
    if (rank < 1 || rank > kMostRank || latents != rank * groups || each * groups != outputs || rank > each)
      fail("ranks of " + where + " do not fit: " + std::to_string(latents) + " latents in " + std::to_string(groups) +
           " groups of rank " + std::to_string(rank) + " for " + std::to_string(outputs) + " outputs");
    std::vector<int64_t> members(static_cast<size_t>(groups));
    for (const float g : group_of) {
      if (!(g >= 0 && g < static_cast<float>(groups)) || g != std::floor(g)) fail(where + "groups names no group");
      ++members[static_cast<size_t>(g)];
      s.group_of.push_back(static_cast<int>(g));
    }
    for (const int64_t n : members) {
      if (n != heads / groups) fail(where + "groups are of different sizes");
    }
    s.groups = static_cast<int>(groups);
    s.rank = static_cast<int>(rank);
    return s;
  }

  std::string path_;
  GgufFile file_;
  GgufMetadata metadata_;
  Checksum sum_;
};

// FactorsInfo::Layer::key_left.
std::vector<double> left_of(const SideFactors& s) {
  const size_t part = s.energies.size() / static_cast<size_t>(s.groups);
  std::vector<double> left(part + 1, 0.0);
  for (size_t i = part; i-- > 0;) {
    left[i] = left[i + 1];
    for (size_t g = 0; g < static_cast<size_t>(s.groups); ++g) left[i] += static_cast<double>(s.energies[g * part + i]);
  }
  const double all = left.front();
  for (double& x : left) x = all > 0 ? x / all : 0.0;
  left.resize(static_cast<size_t>(s.rank) + 1);
  return left;
}

FactorsInfo info_of(const Factors& f, const std::string& path) {
  FactorsInfo info{path, f.method, f.note, f.model, f.fingerprint, f.checksum, {}};
  for (const Factors::Layer& l : f.layers) {
    info.layers.push_back({l.key.groups, l.key.groups * l.key.rank, static_cast<int>(l.key.energies.size()), l.value.groups,
                           l.value.groups * l.value.rank, static_cast<int>(l.value.energies.size()), left_of(l.key),
                           left_of(l.value)});
  }
  return info;
}

}  // namespace

Factors read_factors(const std::string& path) { return FactorsReader(path).read(); }

void check_factors(const FactorsInfo& f, const ModelShape& shape) {
  if (f.fingerprint == shape.fingerprint) return;
  throw Error(Status::kMismatch, f.path + " was made for " + other_model(f.model, f.fingerprint, shape) +
                                     ": factorise this one with kvmix factorise");
}

void check_factors(const Factors& f, const Model& model, bool forced, const std::string& path) {
  const ModelShape& shape = model.shape();
  if (!forced) check_factors(info_of(f, path), shape);
  const auto dim = static_cast<size_t>(gguf_model(model).parameters().model_dim);
  bool fits = f.layers.size() == shape.layers.size();
  for (size_t l = 0; fits && l < f.layers.size(); ++l) {
    const ModelShape::Layer& layer = shape.layers[l];
    const auto outputs = static_cast<size_t>(layer.kv_heads * layer.head_dim);
    for (const SideFactors* s : {&f.layers[l].key, &f.layers[l].value}) {
      fits = fits && s->group_of.size() == static_cast<size_t>(layer.kv_heads) &&
             s->up.size() == outputs * static_cast<size_t>(s->rank) &&
             s->down.size() == static_cast<size_t>(s->groups * s->rank) * dim;
    }
  }
  if (!fits) throw Error(Status::kMismatch, path + " does not fit the model's shape: factorise it with kvmix factorise");
}

void write_factors(const Factors& f, const std::string& path) {
  quiet_libraries();
  struct Pending {
    std::string name;
    int64_t columns, rows;
    std::vector<float> values;
  };
  std::vector<Pending> tensors;
  Checksum sum;
  for (size_t l = 0; l < f.layers.size(); ++l) {
    for (const Side side : {Side::kKey, Side::kValue}) {
      const SideFactors& s = side == Side::kKey ? f.layers[l].key : f.layers[l].value;
      const auto latents = static_cast<int64_t>(s.groups) * s.rank;
      const auto add = [&](const char* what, int64_t rows, std::vector<float> values) {
        sum.update(values.data(), values.size() * sizeof(float));
        tensors.push_back({tensor_name(l, side, what), static_cast<int64_t>(values.size()) / rows, rows, std::move(values)});
      };
      add("down", latents, s.down);
      add("up", static_cast<int64_t>(s.up.size()) / s.rank, s.up);
      add("energies", s.groups, s.energies);
      add("groups", 1, {s.group_of.begin(), s.group_of.end()});
    }
  }
  const GgufContext gguf(gguf_init_empty());
  gguf_set_val_str(gguf.get(), "general.architecture", kKind);
  gguf_set_val_u32(gguf.get(), "kvmix.version", kVersion);
  gguf_set_val_u32(gguf.get(), "kvmix.layers", static_cast<uint32_t>(f.layers.size()));
  for (const auto& [key, text] : {std::pair<const char*, std::string>{"kvmix.method", f.method},
                                  {"kvmix.note", f.note},
                                  {"kvmix.model", f.model},
                                  {"kvmix.fingerprint", f.fingerprint},
                                  {"kvmix.checksum", std::to_string(sum.value())}}) {
    gguf_set_val_str(gguf.get(), key, text.c_str());
  }
  const GgmlContext shapes(ggml_init({tensors.size() * ggml_tensor_overhead(), nullptr, true}));
  for (Pending& t : tensors) {
    ggml_tensor* tensor = ggml_new_tensor_2d(shapes.get(), GGML_TYPE_F32, t.columns, t.rows);
    ggml_set_name(tensor, t.name.c_str());
    gguf_add_tensor(gguf.get(), tensor);
    gguf_set_tensor_data(gguf.get(), t.name.c_str(), t.values.data());
  }
  std::string header(gguf_get_meta_size(gguf.get()), '\0');
  gguf_get_meta_data(gguf.get(), header.data());
  AtomicFile file(path);
  file.write(header.data(), header.size());
  const size_t alignment = gguf_get_alignment(gguf.get());
  for (const Pending& t : tensors) {
    const size_t bytes = t.values.size() * sizeof(float);
    file.write(t.values.data(), bytes);
    const std::string padding((alignment - bytes % alignment) % alignment, '\0');
    file.write(padding.data(), padding.size());
  }
  file.commit();
}

FactorsInfo inspect_factors(const std::string& path) { return info_of(read_factors(path), path); }

Plan with_factors(Plan plan, const FactorsInfo& info) {
  if (plan.layers.size() != info.layers.size())
    throw Error(Status::kMismatch, info.path + " has " + std::to_string(info.layers.size()) + " layers, the plan " +
                                       std::to_string(plan.layers.size()) + ": factorise the plan's model");
  if (plan.tokens || plan.channels) {
    throw Error(Status::kUnsupported,
                "the plan has a policy, which needs keys and values themselves; take a plan without one for " + info.path);
  }
  plan.rank = RankSpec{info.path, info.checksum, info.method};
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    plan.layers[l].key_rank = info.layers[l].key_rank;
    plan.layers[l].value_rank = info.layers[l].value_rank;
    // They are of keys and values themselves.
    plan.layers[l].key.transform = plan.layers[l].value.transform = {};
  }
  plan.predicted.reset();
  plan.note += (plan.note.empty() ? "" : "; ") + std::string("latents by ") + info.method + ", " + info.note;
  return plan;
}

}  // namespace kvmix
