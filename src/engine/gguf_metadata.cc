#include <cmath>

#include "engine/architecture.h"
#include "kvmix/error.h"

namespace kvmix {

std::string GgufMetadata::path_suffix(const std::string& key) const { return path_ + ": metadata key " + key; }

int64_t GgufMetadata::find(const std::string& key) const { return gguf_find_key(gguf_, key.c_str()); }

bool GgufMetadata::has(const std::string& key) const { return find(key) >= 0; }

std::string GgufMetadata::text(const std::string& key) const {
  const int64_t id = find(key);
  if (id < 0)
    throw Error(Status::kCorrupt, path_suffix(key) + " is missing; this is not a complete model file; obtain it again");
  if (gguf_get_kv_type(gguf_, id) != GGUF_TYPE_STRING)
    throw Error(Status::kCorrupt, path_suffix(key) + " is not text; obtain the file again");
  return gguf_get_val_str(gguf_, id);
}

std::string GgufMetadata::text_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? text(key) : fallback;
}

double GgufMetadata::number(const std::string& key) const {
  const int64_t id = find(key);
  if (id < 0)
    throw Error(Status::kCorrupt, path_suffix(key) + " is missing; this is not a complete model file; obtain it again");
  double value = NAN;
  switch (gguf_get_kv_type(gguf_, id)) {
    case GGUF_TYPE_UINT8:
      value = gguf_get_val_u8(gguf_, id);
      break;
    case GGUF_TYPE_INT8:
      value = gguf_get_val_i8(gguf_, id);
      break;
    case GGUF_TYPE_UINT16:
      value = gguf_get_val_u16(gguf_, id);
      break;
    case GGUF_TYPE_INT16:
      value = gguf_get_val_i16(gguf_, id);
      break;
    case GGUF_TYPE_UINT32:
      value = gguf_get_val_u32(gguf_, id);
      break;
    case GGUF_TYPE_INT32:
      value = gguf_get_val_i32(gguf_, id);
      break;
    case GGUF_TYPE_UINT64:
      value = static_cast<double>(gguf_get_val_u64(gguf_, id));
      break;
    case GGUF_TYPE_INT64:
      value = static_cast<double>(gguf_get_val_i64(gguf_, id));
      break;
    case GGUF_TYPE_FLOAT32:
      value = static_cast<double>(gguf_get_val_f32(gguf_, id));
      break;
    case GGUF_TYPE_FLOAT64:
      value = gguf_get_val_f64(gguf_, id);
      break;
    default:
      throw Error(Status::kCorrupt, path_suffix(key) + " is not a number; obtain the file again");
  }
  if (!std::isfinite(value)) throw Error(Status::kCorrupt, path_suffix(key) + " is not finite; obtain the file again");
  return value;
}

double GgufMetadata::number_or(const std::string& key, double fallback) const { return has(key) ? number(key) : fallback; }

int64_t GgufMetadata::integer(const std::string& key, int64_t low, int64_t high) const {
  const double value = number(key);
  if (value != std::floor(value) || value < static_cast<double>(low) || value > static_cast<double>(high)) {
    throw Error(Status::kCorrupt, path_suffix(key) + " is " + std::to_string(value) + "; expected a whole number from " +
                                      std::to_string(low) + " to " + std::to_string(high));
  }
  return static_cast<int64_t>(value);
}

bool GgufMetadata::is_list(const std::string& key) const {
  return has(key) && gguf_get_kv_type(gguf_, find(key)) == GGUF_TYPE_ARRAY;
}

bool GgufMetadata::truth_or(const std::string& key, bool fallback) const {
  if (!has(key)) return fallback;
  if (gguf_get_kv_type(gguf_, find(key)) != GGUF_TYPE_BOOL)
    throw Error(Status::kCorrupt, path_suffix(key) + " is not true or false; obtain the file again");
  return gguf_get_val_bool(gguf_, find(key));
}

std::vector<int64_t> GgufMetadata::per_layer(const std::string& key, int64_t layers, int64_t low, int64_t high) const {
  if (!is_list(key)) return std::vector<int64_t>(static_cast<size_t>(layers), integer(key, low, high));
  const int64_t id = find(key);
  const gguf_type type = gguf_get_arr_type(gguf_, id);
  const bool bytes = type == GGUF_TYPE_BOOL || type == GGUF_TYPE_UINT8 || type == GGUF_TYPE_INT8;
  if (!bytes && type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32)
    throw Error(Status::kCorrupt, path_suffix(key) + " is not a list of whole numbers; obtain the file again");
  if (gguf_get_arr_n(gguf_, id) != static_cast<size_t>(layers)) {
    throw Error(Status::kCorrupt, path_suffix(key) + " has " + std::to_string(gguf_get_arr_n(gguf_, id)) +
                                      " numbers; expected one for each of " + std::to_string(layers) + " layers");
  }
  std::vector<int64_t> values;
  const void* data = gguf_get_arr_data(gguf_, id);
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t value = bytes                      ? static_cast<const int8_t*>(data)[l]
                          : type == GGUF_TYPE_UINT32 ? static_cast<int64_t>(static_cast<const uint32_t*>(data)[l])
                                                     : static_cast<const int32_t*>(data)[l];
    if (value < low || value > high) {
      throw Error(Status::kCorrupt, path_suffix(key) + " is " + std::to_string(value) + " for layer " + std::to_string(l) +
                                        "; expected " + std::to_string(low) + " to " + std::to_string(high));
    }
    values.push_back(value);
  }
  return values;
}

int64_t GgufMetadata::same_in_layers(const std::string& key, int64_t layers, int64_t low, int64_t high) const {
  const std::vector<int64_t> values = per_layer(key, layers, low, high);
  for (size_t l = 1; l < values.size(); ++l) {
    if (values[l] != values[0]) {
      throw Error(Status::kUnsupported, path_suffix(key) + " is " + std::to_string(values[0]) + " for layer 0 and " +
                                            std::to_string(values[l]) + " for layer " + std::to_string(l) +
                                            "; layers with different numbers of heads are not supported");
    }
  }
  return values[0];
}

int64_t GgufMetadata::integer_or(const std::string& key, int64_t fallback, int64_t low, int64_t high) const {
  return has(key) ? integer(key, low, high) : fallback;
}

}  // namespace kvmix
