// The driver (libcuda): enough for torch's allocator, Triton and Inductor to load and launch.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "stand_in.h"

namespace {

constexpr size_t GRANULARITY = size_t(2) << 20;

struct Kernel { std::string name; };

int some_context;

CUresult result_of(int code) { return static_cast<CUresult>(code); }

CUresult run(CUfunction kernel, const unsigned *grid, unsigned threads, CUstream stream) {
  char text[320];
  snprintf(text, sizeof text, "[%u,%u,%u x %u] triton %s", grid[0], grid[1], grid[2], threads,
           reinterpret_cast<Kernel *>(kernel)->name.c_str());
  fake_launch(FAKE_KERNEL, stream, text, 0);
  return CUDA_SUCCESS;
}

void *pointer(CUdeviceptr address) { return reinterpret_cast<void *>(address); }

}  // namespace

extern "C" {

// ---- contexts and devices

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int size, CUdevice) {
  snprintf(name, size_t(size), "Stand-in H100 (runs no kernels)");
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *is_active) {
  if (flags) *flags = 0;
  if (is_active) *is_active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = reinterpret_cast<CUcontext>(&some_context);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext *context) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *value, CUlimit) { return *value = 8 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char **text) {
  *text = "stand-in driver: not supported, or out of memory";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char **text) { return cuGetErrorString(code, text); }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 49152; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: *value = 2048; break;
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED: *value = 0; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

// A function by name, as a statically linked runtime asks for it.
CUresult cuGetProcAddress_v2(const char *name, void **function, int, cuuint64_t,
                             CUdriverProcAddressQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
  if (result)
    *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// ---- modules and kernels

CUresult cuModuleLoadData(CUmodule *module, const void *) {
  static int only;
  *module = reinterpret_cast<CUmodule>(&only);
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, CUjit_option *,
                            void **) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *) { return cuModuleLoadData(module, nullptr); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
  *function = reinterpret_cast<CUfunction>(new Kernel{name});
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction, const CUlaunchConfig *) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction, int, size_t) {
  return *count = 2, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned, CUstream stream, void **,
                        void **) {
  unsigned grid[] = {x, y, z};
  return run(kernel, grid, block_x * block_y * block_z, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **, void **) {
  unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  return run(kernel, grid, config->blockDimX * config->blockDimY * config->blockDimZ,
             config->hStream);
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  memset(map, 0, sizeof *map);
  return CUDA_SUCCESS;
}

// ---- memory

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute, CUdeviceptr address) {
  *static_cast<CUdeviceptr *>(value) = address;  // Triton asks for the device's address only
  return CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
  return result_of(fake_range_of(reinterpret_cast<void **>(base), size, pointer(address)));
}
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *,
                                       CUmemAllocationGranularity_flags) {
  return *size = GRANULARITY, CUDA_SUCCESS;
}
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t, CUdeviceptr,
                             unsigned long long) {
  return result_of(fake_reserve(reinterpret_cast<void **>(address), size));
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  return result_of(fake_unreserve(pointer(address), size));
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *,
                     unsigned long long) {
  return result_of(fake_create(handle, size));
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return result_of(fake_release(handle));
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t, CUmemGenericAllocationHandle handle,
                  unsigned long long) {
  return result_of(fake_map(pointer(address), size, handle));
}
CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  return result_of(fake_unmap(pointer(address), size));
}
CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) {
  return CUDA_SUCCESS;
}

}  // extern "C"
