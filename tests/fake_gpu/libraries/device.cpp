// The device: what an H100 says of itself, and the driver's entry points.
#include <dlfcn.h>

#include <cstring>

#include "runtime.h"

using namespace fake;

namespace {

constexpr int VERSION = 13000, MULTIPROCESSORS = 132, REGISTERS = 65536;
constexpr int SHARED = 49152, SHARED_OPTIN = 232448, SHARED_MULTIPROCESSOR = 233472;
constexpr int THREADS_BLOCK = 1024, THREADS_MULTIPROCESSOR = 2048, GRID_X = 2147483647;
constexpr int L2_BYTES = 50 << 20, BLOCKS_MULTIPROCESSOR = 32;

int unsupported() {
  fprintf(stderr, "stand-in CUDA: a driver function is called that it lacks\n");
  return cudaErrorNotSupported;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  return device ? fail(cudaErrorInvalidDevice, "there is one device") : cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int) {
  snprintf(id, size_t(size), "0000:00:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  *p = {};
  strcpy(p->name, "Stand-in H100 (runs no kernels)");
  p->totalGlobalMem = state().capacity;
  p->major = 9;
  p->multiProcessorCount = MULTIPROCESSORS;
  p->sharedMemPerBlock = SHARED;
  p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = SHARED_MULTIPROCESSOR;
  p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_BLOCK;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = THREADS_MULTIPROCESSOR;
  p->maxBlocksPerMultiProcessor = BLOCKS_MULTIPROCESSOR;
  p->maxGridSize[0] = GRID_X;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->l2CacheSize = L2_BYTES;
  p->memoryBusWidth = 5120;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->concurrentKernels = p->managedMemory = p->canMapHostMemory = 1;
  p->cooperativeLaunch = p->hostRegisterSupported = p->memoryPoolsSupported = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_OPTIN; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_MULTIPROCESSOR; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS_MULTIPROCESSOR; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = THREADS_BLOCK; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = BLOCKS_MULTIPROCESSOR; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = L2_BYTES; break;
    case cudaDevAttrMaxGridDimX: *value = GRID_X; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = THREADS_BLOCK; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = REGISTERS; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }

// The driver's functions lie in the stand-in libcuda, some under their second version's name.
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (!*function) *function = reinterpret_cast<void *>(unsupported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
