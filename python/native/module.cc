// kvmix._native: errors, and what makes the module.
#include "module.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <exception>
#include <optional>

#include "kvmix/cache.h"
#include "kvmix/error.h"

namespace kvmix::python {
namespace {

// An Error is the exception of kvmix._errors that its status names, with the same line.
void raise(const Error& e) {
  const nb::object error = nb::module_::import_("kvmix._errors").attr("of_status")(status_name(e.status()), e.what());
  if (const auto* budget = dynamic_cast<const BudgetError*>(&e)) {
    const nb::object own = nb::module_::import_("kvmix._errors").attr("BudgetError")(e.what());
    own.attr("least_bytes") = budget->least_bytes();
    PyErr_SetObject(own.type().ptr(), own.ptr());
    return;
  }
  PyErr_SetObject(error.type().ptr(), error.ptr());
}

void translate(const std::exception_ptr& p, void*) {
  try {
    std::rethrow_exception(p);
  } catch (const Error& e) {
    raise(e);
  }
}

}  // namespace

void run_long(const nb::object& progress, const std::function<void(const Progress&)>& work) {
  std::optional<nb::python_error> raised;
  const Progress report = [&](double done, double total, const std::string& what) {
    const nb::gil_scoped_acquire lock;
    if (raised) return false;
    try {
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      if (!progress.is_none()) progress(done, total, what);
    } catch (nb::python_error& e) {
      raised.emplace(std::move(e));
      return false;
    }
    return true;
  };
  try {
    const nb::gil_scoped_release unlocked;
    work(report);
  } catch (const Error&) {
    if (!raised) throw;
  }
  if (raised) throw nb::python_error(std::move(*raised));
}

}  // namespace kvmix::python

NB_MODULE(_native, m) {
  m.doc() = "The KVmix library.";
  m.attr("__version__") = KVMIX_VERSION;
  nanobind::register_exception_translator(kvmix::python::translate);
  kvmix::python::bind_plan(m);
  kvmix::python::bind_cache(m);
  kvmix::python::bind_model(m);
  kvmix::python::bind_measure(m);
  kvmix::python::bind_paged(m);
}
