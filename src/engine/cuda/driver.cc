// The CUDA driver's functions that ggml's backend calls, found when they are first needed: so the program starts on machines
// without a driver, and says what is missing only to those who ask for a GPU. In place of a link to libcuda.
#include <cuda.h>
#include <dlfcn.h>

namespace {

template <class Function>
Function* entry(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  return library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
}

// Versions of a function differ in name: what the header's name stands for is looked up.
#define KVMIX_TEXT(x) #x
#define KVMIX_NAME(x) KVMIX_TEXT(x)

}  // namespace

#define KVMIX_DRIVER_CALL(name, parameters, arguments)                      \
  CUresult CUDAAPI name parameters {                                        \
    static auto* const function = entry<decltype(name)>(KVMIX_NAME(name));  \
    return function == nullptr ? CUDA_ERROR_NOT_FOUND : function arguments; \
  }

extern "C" {
KVMIX_DRIVER_CALL(cuGetErrorString, (CUresult error, const char** text), (error, text))
KVMIX_DRIVER_CALL(cuDeviceGet, (CUdevice * device, int ordinal), (device, ordinal))
KVMIX_DRIVER_CALL(cuDeviceGetAttribute, (int* value, CUdevice_attribute which, CUdevice device), (value, which, device))
KVMIX_DRIVER_CALL(cuMemAddressFree, (CUdeviceptr at, size_t bytes), (at, bytes))
KVMIX_DRIVER_CALL(cuMemAddressReserve,
                  (CUdeviceptr * at, size_t bytes, size_t alignment, CUdeviceptr wish, unsigned long long flags),
                  (at, bytes, alignment, wish, flags))
KVMIX_DRIVER_CALL(cuMemCreate,
                  (CUmemGenericAllocationHandle * handle, size_t bytes, const CUmemAllocationProp* what,
                   unsigned long long flags),
                  (handle, bytes, what, flags))
KVMIX_DRIVER_CALL(cuMemGetAllocationGranularity,
                  (size_t * bytes, const CUmemAllocationProp* what, CUmemAllocationGranularity_flags which),
                  (bytes, what, which))
KVMIX_DRIVER_CALL(cuMemMap,
                  (CUdeviceptr at, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags),
                  (at, bytes, offset, handle, flags))
KVMIX_DRIVER_CALL(cuMemRelease, (CUmemGenericAllocationHandle handle), (handle))
KVMIX_DRIVER_CALL(cuMemSetAccess, (CUdeviceptr at, size_t bytes, const CUmemAccessDesc* access, size_t count),
                  (at, bytes, access, count))
KVMIX_DRIVER_CALL(cuMemUnmap, (CUdeviceptr at, size_t bytes), (at, bytes))
}
