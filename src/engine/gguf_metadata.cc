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

int64_t GgufMetadata::integer_or(const std::string& key, int64_t fallback, int64_t low, int64_t high) const {
  return has(key) ? integer(key, low, high) : fallback;
}

}  // namespace kvmix
