// The parts of kvmix._native, one file each.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <functional>
#include <string>

#include "kvmix/plan.h"

namespace kvmix::python {

namespace nb = nanobind;

void bind_plan(nb::module_& m);
void bind_cache(nb::module_& m);
void bind_model(nb::module_& m);
void bind_measure(nb::module_& m);
void bind_paged(nb::module_& m);

// What the device "cuda" of these bindings takes: rows in device memory, a stream by number (0: the default one). Throws
// kInvalidArgument for a stream of another device.
void set_device(CacheConfig& config, const std::string& device, uintptr_t stream);
// The GPU that what was just made on the device "cuda" is on.
int current_gpu();

// Runs `work`, which may take long, without the interpreter's lock. `progress` is None or a function (done, total, what) that
// is called with it; what it raises, or Ctrl-C, stops the work and is raised.
void run_long(const nb::object& progress, const std::function<void(const Progress&)>& work);

}  // namespace kvmix::python
