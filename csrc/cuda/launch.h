// Host side: launching a kernel, filling memory, asking a device what it is. Errors are thrown as std::runtime_error.
#pragma once

#include <stdexcept>
#include <string>

#include "choose.h"
#include "device.h"
#include "tile.h"

namespace fastrnn::cuda {

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastrnn: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (bytes > kAlwaysAllowed)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
}

// `together`: all blocks are resident at the same time, or the launch fails. `shared` is what a kernel may have always,
// or what allow_shared has allowed.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, bool together, Stream stream,
            const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(kThreads), config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = together ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
}

// How many blocks of the kernel the whole device holds at once.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), size_t shared, const Chip& chip) {
  int blocks = 0;
  allow_shared(kernel, shared);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared), "occupancy");
  return blocks * chip.multiprocessors;
}

// Polls, each about half a microsecond or more, after which a wait gives up: some ten seconds.
inline unsigned spin_limit() { return 1u << 24; }

inline void fill_bytes(void* to, int byte, size_t count, Stream stream) {
  if (count > 0) check(cudaMemsetAsync(to, byte, count, stream), "filling memory");
}

inline Chip chip_of_current_device() {
  int device = 0, values[4] = {};
  const cudaDeviceAttr asked[4] = {cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                                   cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin};
  check(cudaGetDevice(&device), "the current device");
  for (int i = 0; i < 4; ++i) check(cudaDeviceGetAttribute(&values[i], asked[i], device), "what the device is");
  return {values[0] * 10 + values[1], values[2], values[3]};
}

#else

template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, bool together, Stream, const Args&... args) {
  emulate::launch(reinterpret_cast<void*>(kernel), grid, kThreads, shared, together, [&] { kernel(args...); });
}

template <class... Parameters>
void allow_shared(void (*)(Parameters...), size_t) {}

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), size_t, const Chip& chip) {
  return chip.multiprocessors;
}

inline unsigned spin_limit() { return emulate::settings().spin_limit; }

inline void fill_bytes(void* to, int byte, size_t count, Stream) { memset(to, byte, count); }

inline Chip chip_of_current_device() {
  return {emulate::chip().compute, emulate::chip().multiprocessors, emulate::chip().shared};
}

#endif

}  // namespace fastrnn::cuda
