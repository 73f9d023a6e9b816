// Host side: launching a kernel, filling memory, asking a device what it is. Errors are thrown as std::runtime_error.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"
#include "recurrence.h"
#include "tile.h"

namespace fastrnn::cuda {

// Which blocks of a launch are resident at the same time, or it fails.
struct Together {
  bool all = false;
  unsigned cluster = 1;  // so many neighbours in x, which can reach each other's shared memory as well
};

constexpr unsigned kMostClusterBlocks = 16;

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or else whoever launches next would report it
  throw std::runtime_error(std::string("fastrnn: ") + what + ": " + cudaGetErrorString(error));
}

template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), size_t bytes) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (bytes > kAlwaysAllowed)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), "shared memory");
}

// What the runtime says of blocks that cannot be resident together.
inline bool is_refusal(cudaError_t error) {
  return error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorInvalidClusterSize ||
         error == cudaErrorLaunchOutOfResources || error == cudaErrorInvalidConfiguration;
}

// `attributes` must live as long as what is returned.
inline cudaLaunchConfig_t config_of(dim3 grid, size_t shared, Together together, cudaLaunchAttribute (&attributes)[2]) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(kThreads), config.dynamicSmemBytes = shared;
  config.attrs = attributes;
  if (together.all) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (together.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = together.cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  return config;
}

// `shared` is what a kernel may have always, or what allow_shared has allowed.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, Together together, Stream stream,
            const Args&... args) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = config_of(grid, shared, together, attributes);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if ((together.all || together.cluster > 1) && is_refusal(error)) {
    cudaGetLastError();
    throw LaunchRefused(cudaGetErrorString(error));
  }
  check(error, "launching a kernel");
}

// How many clusters of so many blocks the whole device holds at once.
template <class... Parameters>
int resident_clusters(void (*kernel)(Parameters...), int blocks, size_t shared) {
  if (blocks > int(kMostClusterBlocks)) return 0;
  int clusters = 0;
  cudaLaunchAttribute attributes[2] = {};
  const cudaLaunchConfig_t config = config_of(dim3(unsigned(blocks)), shared, {false, unsigned(blocks)}, attributes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (is_refusal(error)) return cudaGetLastError(), 0;
  check(error, "occupancy of clusters");
  return clusters;
}

// How many blocks of the kernel the whole device holds at once.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), size_t shared, const Chip& chip) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared), "occupancy");
  return blocks * chip.multiprocessors;
}

// Ticks after which a wait gives up: ten seconds.
inline uint32_t wait_limit() { return 10000; }

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
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared, Together together, Stream, const Args&... args) {
  if (together.cluster > kMostClusterBlocks) throw std::runtime_error("emulate: more blocks than a cluster may have");
  if ((together.all || together.cluster > 1) && emulate::settings().refuses)
    throw LaunchRefused("emulate: it is set to");
  emulate::launch(reinterpret_cast<void*>(kernel), grid, kThreads, shared, together.all, together.cluster,
                  [&] { kernel(args...); });
}

template <class... Parameters>
int resident_clusters(void (*)(Parameters...), int blocks, size_t) {
  return blocks <= int(kMostClusterBlocks) ? emulate::resident_clusters(blocks) : 0;
}

template <class... Parameters>
void allow_shared(void (*)(Parameters...), size_t) {}

template <class... Parameters>
int resident_blocks(void (*)(Parameters...), size_t, const Chip& chip) {
  return chip.multiprocessors;
}

inline uint32_t wait_limit() { return emulate::settings().wait_limit; }

inline void fill_bytes(void* to, int byte, size_t count, Stream) { memset(to, byte, count); }

inline Chip chip_of_current_device() {
  return {emulate::chip().compute, emulate::chip().multiprocessors, emulate::chip().shared};
}

#endif

}  // namespace fastrnn::cuda
