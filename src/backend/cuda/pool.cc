#include "backend/cuda/pool.h"

#include <cuda.h>

#include <algorithm>
#include <string>

#include "base/cuda/launch.h"
#include "kvmix/error.h"

namespace kvmix::cuda {

struct DriverCalls {
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) free_range;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuGetErrorName) error_name;
};

namespace {

constexpr size_t kMostRange = (size_t{1} << 31) * kPageUnit;  // units are int32 in page tables

template <class Call>
void find_call(Call& call, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw Error(Status::kUnsupported, std::string("device \"cuda\": the driver has no ") + name +
                                          "; install one for CUDA 12 or newer, or take the device \"cpu\"");
  }
  call = reinterpret_cast<Call>(found);
}

const DriverCalls& driver_calls() {
  static const DriverCalls calls = [] {
    DriverCalls c{};
    find_call(c.reserve, "cuMemAddressReserve"), find_call(c.free_range, "cuMemAddressFree");
    find_call(c.create, "cuMemCreate"), find_call(c.release, "cuMemRelease");
    find_call(c.map, "cuMemMap"), find_call(c.unmap, "cuMemUnmap");
    find_call(c.set_access, "cuMemSetAccess"), find_call(c.error_name, "cuGetErrorName");
    return c;
  }();
  return calls;
}

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp p{};
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  p.location.id = device;
  return p;
}

std::string gibibytes(size_t bytes) {
  return std::to_string(bytes >> 30) + "." + std::to_string((bytes >> 20) % 1024 * 10 / 1024) + " GiB";
}

}  // namespace

DevicePool::DevicePool(size_t max_bytes, cudaStream_t stream)
    : driver_(driver_calls()),
      stream_(stream),
      device_(current_device()),
      max_bytes_(max_bytes),
      chunk_bytes_(chunk_bytes(max_bytes)) {
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "pool");
  const size_t most = std::min(max_bytes == 0 ? total : std::min(max_bytes, total), kMostRange);
  range_bytes_ = (most + chunk_bytes_ - 1) / chunk_bytes_ * chunk_bytes_;
  if (driver_.reserve(&base_, range_bytes_, kLargeChunk, 0, 0) != CUDA_SUCCESS) {
    throw Error(Status::kOutOfMemory, "device \"cuda\": no range of " + gibibytes(range_bytes_) +
                                          " addresses for pages; set a smaller limit of bytes");
  }
  chunks_.resize(range_bytes_ / chunk_bytes_);
  for (uint32_t i = 0; i < chunks_.size(); ++i) unmapped_.insert(unmapped_.end(), i);
}

DevicePool::~DevicePool() {
  static_cast<void>(cudaStreamSynchronize(stream_));
  for (uint32_t i = 0; i < chunks_.size(); ++i) unmap(chunks_[i], i);
  driver_.free_range(base_, range_bytes_);
}

void DevicePool::throw_limit() const {
  throw Error(Status::kOutOfMemory, "the cache limit of " + std::to_string(max_bytes_) +
                                        " bytes is reached: remove a sequence, raise the limit or use a smaller plan");
}

void DevicePool::map(uint32_t index, size_t bytes) {
  Chunk& chunk = chunks_[index];
  if (chunk.mapped >= bytes) return;
  check_cuda(cudaSetDevice(device_), "pool: device");
  const CUmemAllocationProp properties = memory_of(device_);
  while (chunk.mapped < bytes) {
    const size_t part = std::min(part_bytes(taken_), chunk_bytes_ - chunk.mapped);
    if (max_bytes_ != 0 && taken_ + part > range_bytes_) throw_limit();
    CUmemGenericAllocationHandle memory = 0;
    const auto refused = [&](CUresult status, const char* call) {
      if (status == CUDA_SUCCESS) return;
      if (memory != 0) driver_.release(memory);
      const char* name = nullptr;
      driver_.error_name(status, &name);
      if (status == CUDA_ERROR_OUT_OF_MEMORY) {
        throw Error(Status::kOutOfMemory, "the device has no memory for further pages beyond " + gibibytes(taken_) +
                                              ": use fewer sequences, a shorter context or a smaller plan");
      }
      throw Error(Status::kInternal, std::string("pool: ") + call + ": " + (name == nullptr ? "unknown error" : name));
    };
    const CUdeviceptr at = base_ + index * chunk_bytes_ + chunk.mapped;
    refused(driver_.create(&memory, part, &properties, 0), "cuMemCreate");
    refused(driver_.map(at, part, 0, memory, 0), "cuMemMap");
    CUmemAccessDesc access{};
    access.location = properties.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    if (const CUresult status = driver_.set_access(at, part, &access, 1); status != CUDA_SUCCESS) {
      driver_.unmap(at, part);
      refused(status, "cuMemSetAccess");
    }
    chunk.memory.push_back({memory, part});
    chunk.mapped += part;
    taken_ += part;
  }
}

void DevicePool::unmap(Chunk& chunk, uint32_t index) {
  for (const Memory& part : chunk.memory) {
    chunk.mapped -= part.bytes;
    taken_ -= part.bytes;
  }
  CUdeviceptr at = base_ + index * chunk_bytes_;
  for (const Memory& part : chunk.memory) {
    driver_.unmap(at, part.bytes);
    driver_.release(part.handle);
    at += part.bytes;
  }
  chunk.memory.clear();
}

std::set<uint32_t>& DevicePool::open_chunks(size_t bytes) {
  if (recent_ < sizes_.size() && sizes_[recent_].bytes == bytes) return sizes_[recent_].open;
  const auto known = std::find_if(sizes_.begin(), sizes_.end(), [&](const Size& size) { return size.bytes == bytes; });
  recent_ = static_cast<size_t>(known - sizes_.begin());
  if (known == sizes_.end()) sizes_.push_back({bytes, {}});
  return sizes_[recent_].open;
}

uint32_t DevicePool::allocate(size_t bytes) {
  if (bytes == 0 || bytes % kPageUnit != 0 || bytes > chunk_bytes_)
    throw Error(Status::kInternal, "pool: a page of " + std::to_string(bytes) + " bytes");
  if (max_bytes_ != 0 && used_ + bytes > max_bytes_) throw_limit();
  std::set<uint32_t>& open = open_chunks(bytes);
  if (open.empty()) {
    if (spare_.empty() && unmapped_.empty()) {
      if (max_bytes_ != 0) throw_limit();
      throw Error(Status::kOutOfMemory, "the device has no memory for further pages beyond " + gibibytes(taken_) +
                                            ": use fewer sequences, a shorter context or a smaller plan");
    }
    const bool used = !spare_.empty();
    const uint32_t fresh = used ? spare_.back() : *unmapped_.begin();
    Chunk& chunk = chunks_[fresh];
    map(fresh, bytes);
    used ? spare_.pop_back() : static_cast<void>(unmapped_.erase(unmapped_.begin()));
    chunk.bytes = bytes;
    chunk.carved = chunk.live = 0;
    chunk.free.clear();
    open.insert(fresh);
  }
  const uint32_t index = *open.begin();
  Chunk& chunk = chunks_[index];
  uint32_t slot;
  if (chunk.free.empty()) {
    map(index, (chunk.carved + 1) * bytes);
    slot = chunk.carved++;
  } else {
    slot = chunk.free.back();
    chunk.free.pop_back();
  }
  ++chunk.live;
  used_ += bytes;
  if (chunk.free.empty() && (chunk.carved + 1) * bytes > chunk_bytes_) open.erase(open.begin());
  return static_cast<uint32_t>((index * chunk_bytes_ + slot * bytes) / kPageUnit);
}

void DevicePool::release(uint32_t unit, size_t bytes) {
  const size_t offset = unit * kPageUnit;
  const auto index = static_cast<uint32_t>(offset / chunk_bytes_);
  Chunk& chunk = chunks_[index];
  std::set<uint32_t>& open = open_chunks(bytes);
  used_ -= bytes;
  if (--chunk.live == 0) {
    open.erase(index);
    chunk.bytes = 0;
    spare_.push_back(index);
    return;
  }
  if (chunk.free.empty() && (chunk.carved + 1) * bytes > chunk_bytes_) open.insert(index);  // it had no room
  chunk.free.push_back(static_cast<uint32_t>((offset - index * chunk_bytes_) / bytes));
}

void DevicePool::trim() {
  const size_t keep = used_ == 0 ? 0 : used_ / 16 / chunk_bytes_ + (part_bytes(taken_) < chunk_bytes_ ? 1 : 4);
  if (spare_.size() <= keep) return;
  // Waiting is for what is worth it: what a step or two have left can go when the device has nothing to do.
  const cudaError_t state = cudaStreamQuery(stream_);
  if (state != cudaErrorNotReady) {
    check_cuda(state, "pool: the stream");
  } else {
    static_cast<void>(cudaGetLastError());
    if (spare_.size() <= 2 * keep) return;
  }
  check_cuda(cudaStreamSynchronize(stream_), "pool: what was queued before memory is given back");
  while (spare_.size() > keep) {
    unmap(chunks_[spare_.back()], spare_.back());
    unmapped_.insert(spare_.back());
    spare_.pop_back();
  }
}

}  // namespace kvmix::cuda
