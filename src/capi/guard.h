// What stands between C++ and a C caller: exceptions become statuses, and structs of other versions of a header are read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <type_traits>

#include "kvmix/error.h"
#include "kvmix/kvmix.h"

namespace kvmix {

// Runs a body that may throw anything; what it says goes into `last_error`.
template <typename Body>
kvmix_status run_guarded(std::string& last_error, const Body& body) noexcept {
  const auto failed = [&](Status status, const char* message) {
    try {
      last_error = message;
    } catch (...) {
      last_error.clear();
    }
    return static_cast<kvmix_status>(status);
  };
  try {
    body();
    return KVMIX_OK;
  } catch (const Error& e) {
    return failed(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return failed(Status::kOutOfMemory, "the system has no memory left; free some and try again");
  } catch (const std::exception& e) {
    return failed(Status::kInternal, e.what());
  } catch (...) {
    return failed(Status::kInternal, "something that is not a std::exception was thrown inside the library: please report");
  }
}

inline void need(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Error(Status::kInvalidArgument, std::string(name) + " is null; pass a valid pointer");
}

// No struct will ever be larger; a larger size was never set.
inline constexpr size_t kMostStructBytes = 4096;

// Throws unless a caller may have a struct `type` of this size. `least` bytes of it have no default.
inline void check_struct_bytes(size_t bytes, size_t least, const char* type) {
  // Layouts grow by multiples of a pointer and have no padding, so that a size never ends inside a field.
  if (bytes < least || bytes > kMostStructBytes || bytes % sizeof(void*) != 0) {
    throw Error(Status::kInvalidArgument, std::string(type) + ".struct_bytes is " + std::to_string(bytes) +
                                              "; expected at least " + std::to_string(least) + ": set it to sizeof(" + type +
                                              ")");
  }
}

// A caller's struct as this version knows it: what it lacks is as in `defaults`.
template <typename T>
T read_struct(const T* from, const T& defaults, size_t least, const char* type) {
  static_assert(sizeof(T) % sizeof(void*) == 0 && std::is_trivially_copyable_v<T>);
  check_struct_bytes(from->struct_bytes, least, type);
  const auto* bytes = reinterpret_cast<const std::byte*>(from);
  if (std::any_of(bytes + std::min(sizeof(T), from->struct_bytes), bytes + from->struct_bytes,
                  [](std::byte b) { return b != std::byte{}; })) {
    throw Error(Status::kUnsupported, std::string(type) + " has " + std::to_string(from->struct_bytes) + " bytes, of which " +
                                          kvmix_version() + " knows " + std::to_string(sizeof(T)) +
                                          ", and the rest is not zero: use a newer library or leave its fields out");
  }
  T made = defaults;
  std::memcpy(&made, from, std::min(sizeof(T), from->struct_bytes));
  made.struct_bytes = sizeof(T);
  return made;
}

// Calls take(element) for a caller's array, whose elements may have another size than here.
template <typename T, typename Take>
void read_array(const T* array, size_t count, const T& defaults, size_t least, const char* type, const Take& take) {
  const auto* at = reinterpret_cast<const std::byte*>(array);
  for (size_t i = 0; i < count; ++i) {
    const T* from = reinterpret_cast<const T*>(at);
    if (from->struct_bytes != array->struct_bytes) {
      throw Error(Status::kInvalidArgument, std::string(type) + " " + std::to_string(i) + " of an array has struct_bytes " +
                                                std::to_string(from->struct_bytes) + ", the first " +
                                                std::to_string(array->struct_bytes) + "; set both to sizeof(" + type + ")");
    }
    take(read_struct(from, defaults, least, type));
    at += array->struct_bytes;
  }
}

// Into a caller's struct, as much as it holds; what this version does not know becomes zero.
template <typename T>
void write_struct(const T& from, T* to, size_t least, const char* type) {
  check_struct_bytes(to->struct_bytes, least, type);
  const size_t bytes = to->struct_bytes, known = std::min(sizeof(T), bytes);
  auto* out = reinterpret_cast<std::byte*>(to);
  std::memcpy(out, &from, known);
  std::memset(out + known, 0, bytes - known);
  to->struct_bytes = bytes;
}

}  // namespace kvmix
