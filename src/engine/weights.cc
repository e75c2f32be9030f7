// A model's tensors: each where the mapped file has it, none missing, none left over, all of the shapes that the metadata
// means.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "base/checksum.h"
#include "engine/gguf_check.h"
#include "engine/model.h"
#include "kvmix/error.h"

namespace kvmix {
namespace {

constexpr size_t kSampledBytes = 4096;  // of each tensor, for the fingerprint

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

void GgufModel::place(const ggml_tensor* type, const std::string& name, int64_t ne0, int64_t ne1, char* data, size_t part) {
  ggml_tensor* tensor = ggml_new_tensor_2d(tensors_.get(), type->type, ne0, ne1);
  ggml_set_name(tensor, name.c_str());
  if (ggml_backend_tensor_alloc(mapped_buffers_[part].get(), tensor, data) != GGML_STATUS_SUCCESS)
    throw Error(Status::kInternal, file_.path() + ": tensor " + name + " cannot be placed");
  stored_.add(name, tensor);
}

// The rows of the query, key and value projections in one tensor are theirs one after the other.
void GgufModel::add_fused(const GgufFile::Tensor& tensor, const std::string& prefix, const std::string& kind) {
  const HyperParameters& p = parameters_;
  const bool matrix = kind == "weight";
  const int64_t q = p.q_heads * p.head_dim, kv = p.kv_heads * p.head_dim;
  const int64_t in = matrix ? p.model_dim : 1, out = q + 2 * kv;
  const ggml_tensor* shape = tensor.shape;
  const int64_t rows = matrix ? shape->ne[1] : shape->ne[0], columns = matrix ? shape->ne[0] : 1;
  if (rows != out || columns != in || shape->ne[2] != 1 || shape->ne[3] != 1 || (!matrix && shape->ne[1] != 1)) {
    throw Error(Status::kCorrupt, file_.path() + ": tensor " + tensor.name + " is " + std::to_string(shape->ne[0]) + " x " +
                                      std::to_string(shape->ne[1]) + ", its metadata means " + std::to_string(out) +
                                      " rows of " + std::to_string(in));
  }
  if (!matrix) check_vector_type(shape, file_.path());
  const size_t row_bytes = tensor.bytes / static_cast<size_t>(rows);
  int64_t row = 0;
  for (const auto& [name, n] : {std::pair<const char*, int64_t>{"attn_q.", q}, {"attn_k.", kv}, {"attn_v.", kv}}) {
    if (stored_.find(prefix + name + kind) != nullptr) {
      throw Error(Status::kUnsupported, file_.path() + ": tensors " + tensor.name + " and " + prefix + name + kind +
                                            " both give a projection; obtain the file again");
    }
    place(shape, prefix + name + kind, matrix ? in : n, matrix ? n : 1, tensor.data + static_cast<size_t>(row) * row_bytes,
          tensor.part);
    row += n;
  }
}

void GgufModel::load_weights() {
  const auto& tensors = file_.tensors();
  tensors_.reset(ggml_init({(tensors.size() * 3 + 1) * ggml_tensor_overhead(), nullptr, true}));
  for (size_t i = 0; i < file_.parts(); ++i) {
    mapped_buffers_.emplace_back(ggml_backend_cpu_buffer_from_ptr(file_.mapped(i).data(), file_.mapped(i).bytes()));
  }
  Checksum fingerprint;
  fingerprint.update(architecture_->name(), std::strlen(architecture_->name()));
  std::vector<const GgufFile::Tensor*> fused;
  for (const GgufFile::Tensor& t : tensors) {
    if (t.name.starts_with("blk.") && t.name.find(".attn_qkv.") != std::string::npos) {
      fused.push_back(&t);
    } else {
      place(t.shape, t.name, t.shape->ne[0], ggml_nrows(t.shape), t.data, t.part);
    }
    weight_bytes_ += t.bytes;
    fingerprint.update(t.name.data(), t.name.size());
    fingerprint.update(t.shape->ne, sizeof t.shape->ne);
    const int32_t type = t.shape->type;
    fingerprint.update(&type, sizeof type);
    fingerprint.update(t.data, std::min(t.bytes, kSampledBytes));
  }
  for (const GgufFile::Tensor* t : fused) {
    const size_t at = t->name.find("attn_qkv.");
    const std::string kind = t->name.substr(at + std::strlen("attn_qkv."));
    if (kind != "weight" && kind != "bias")
      throw Error(Status::kUnsupported, file_.path() + ": tensor " + t->name + " is not supported");
    add_fused(*t, t->name.substr(0, at), kind);
  }
  const HyperParameters& p = parameters_;
  fingerprint.update(&p.rope.base, sizeof p.rope.base);
  fingerprint.update(&p.rope.scale, sizeof p.rope.scale);
  fingerprint.update(&p.sliding_window, sizeof p.sliding_window);
  shape_.fingerprint = hex(fingerprint.value());

  const ggml_tensor* embedding = stored_.find("token_embd.weight");
  parameters_.vocab = embedding == nullptr ? 2 : embedding->ne[1];
  if (parameters_.vocab < 2 || parameters_.vocab > (1 << 24)) {
    throw Error(Status::kCorrupt, file_.path() + ": a vocabulary of " + std::to_string(parameters_.vocab) +
                                      " tokens; expected 2 to 16777216, obtain the file again");
  }
  check_weights();
}

void GgufModel::check_weights() const {
  std::map<std::string, TensorSpec> specs;
  for (TensorSpec& spec : architecture_->tensors(parameters_)) specs.emplace(spec.name, spec);
  for (const auto& [name, tensor] : stored_.all()) {
    const auto found = specs.find(name);
    if (found == specs.end()) {
      throw Error(Status::kUnsupported, file_.path() + ": nothing reads tensor " + name + " in models of kind " +
                                            architecture_->name() + " with " + std::to_string(parameters_.layers) +
                                            " layers, so its answers would be wrong; convert the model again");
    }
    const TensorSpec& spec = found->second;
    if (spec.out == 1) {
      check_vector_type(tensor, file_.path());
    } else {
      check_matrix_type(tensor, file_.path());
    }
    if (tensor->ne[0] != spec.in || tensor->ne[1] != spec.out) {
      throw Error(Status::kCorrupt, file_.path() + ": tensor " + name + " is " + std::to_string(tensor->ne[0]) + " x " +
                                        std::to_string(tensor->ne[1]) + ", its metadata means " + std::to_string(spec.in) +
                                        " x " + std::to_string(spec.out));
    }
  }
  for (const auto& [name, spec] : specs) {
    if (spec.required && stored_.find(name) == nullptr)
      throw Error(Status::kCorrupt, file_.path() + ": tensor " + name + " is missing; obtain the file again");
  }
}

}  // namespace kvmix
