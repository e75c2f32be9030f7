// Arrays of other frameworks, taken through DLPack or the buffer protocol and checked before use.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kvmix/error.h"

namespace kvmix::python {

namespace nb = nanobind;

[[noreturn]] inline void refuse(const std::string& what) { throw Error(Status::kInvalidArgument, what); }

// Whose memory arrays must be in: the CPU's, or that of a GPU by its number.
struct Place {
  int gpu = -1;
  bool on_cpu() const { return gpu < 0; }
};

// float32 rows [rows][heads][head_dim] whose last two axes are contiguous.
struct Rows {
  nb::ndarray<> array;
  float* data = nullptr;
  int64_t rows = 0, stride = 0;
};

inline std::string shape_text(const nb::ndarray<>& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
  return text + "]";
}

// `rows` < 0: any number. Throws kInvalidArgument naming the argument and what it should be.
inline Rows take_rows(nb::handle object, const char* name, int64_t rows, int64_t heads, int64_t head_dim, bool writable,
                      Place place = {}) {
  const std::string where = std::string(name) + " ";
  const std::string expected = "; expected float32 [" + (rows < 0 ? "rows" : std::to_string(rows)) + ", " +
                               std::to_string(heads) + ", " + std::to_string(head_dim) + "]";
  Rows result;
  const bool taken = writable ? nb::try_cast(object, result.array) : [&] {
    nb::ndarray<nb::ro> array;
    if (!nb::try_cast(object, array)) return false;
    result.array = nb::ndarray<>(array);
    return true;
  }();
  if (!taken) {
    refuse(where + "is a " + nb::cast<std::string>(object.type().attr("__name__")) + " that gives no array (DLPack or buffer)" +
           (writable ? ", or a read-only one" : "") + expected + ", of a tensor without gradients");
  }
  const nb::ndarray<>& array = result.array;
  if (place.on_cpu() && array.device_type() != nb::device::cpu::value)
    refuse(where + "is not in the CPU's memory: move it there, e.g. with .cpu()");
  if (!place.on_cpu() && (array.device_type() != nb::device::cuda::value || array.device_id() != place.gpu))
    refuse(where + "is not in the memory of GPU " + std::to_string(place.gpu) +
           ", where the cache is: move it there, e.g. with .cuda()");
  if (array.dtype() != nb::dtype<float>()) refuse(where + "is not float32: convert it, e.g. with .float()" + expected);
  if (array.ndim() != 3 || static_cast<int64_t>(array.shape(1)) != heads || static_cast<int64_t>(array.shape(2)) != head_dim ||
      (rows >= 0 && static_cast<int64_t>(array.shape(0)) != rows)) {
    refuse(where + "has shape " + shape_text(array) + expected);
  }
  result.rows = static_cast<int64_t>(array.shape(0));
  result.stride = result.rows > 1 ? array.stride(0) : heads * head_dim;
  if (array.stride(2) != 1 || (heads > 1 && array.stride(1) != head_dim) || result.stride < heads * head_dim)
    refuse(where + "has rows that are not contiguous: make it so, e.g. with .contiguous()" + expected);
  result.data = static_cast<float*>(array.data());
  return result;
}

// An array of its own, which NumPy shows.
template <typename T>
nb::ndarray<nb::numpy, T> as_numpy(std::vector<T> values, std::initializer_list<size_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  const nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T>(kept->data(), shape, owner);
}

}  // namespace kvmix::python
