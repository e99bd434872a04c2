// Kernels: registered by name when a library is loaded, counted when launched, never run.
#include <unordered_map>

#include "runtime.h"

namespace fake {
namespace {

std::unordered_map<const void *, std::string> &kernels() {
  static auto *names = new std::unordered_map<const void *, std::string>;
  return *names;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;

cudaError_t run(const void *kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  Lock lock;
  auto found = kernels().find(kernel);
  std::string name = found == kernels().end() ? "?" : found->second;
  unsigned threads = block.x * block.y * block.z;
  bool is_valid = grid.x && grid.y && grid.z && threads && threads <= 1024 && grid.y <= 65535 &&
                  grid.z <= 65535;
  std::string sizes = "[" + std::to_string(grid.x) + "," + std::to_string(grid.y) + "," +
                      std::to_string(grid.z) + " x " + std::to_string(threads) + "] ";
  if (!is_valid)
    return fail(cudaErrorInvalidConfiguration, "no grid for a kernel: " + sizes + name);
  launch(KERNEL, stream, (sizes + name).c_str());
  return cudaSuccess;
}

}  // namespace
}  // namespace fake

using namespace fake;

extern "C" {

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
char __cudaInitModule(void **) { return 1; }
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, uint3 *,
                            uint3 *, dim3 *, dim3 *, int *) {
  Lock lock;
  kernels()[function] = name;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  Configuration last = pushed.back();
  pushed.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t *>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **, size_t,
                               cudaStream_t stream) {
  return run(kernel, grid, block, stream);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **, size_t,
                             cudaStream_t stream) {
  return run(kernel, grid, block, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **, size_t,
                                        cudaStream_t stream) {
  return run(kernel, grid, block, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **) {
  return run(kernel, config->gridDim, config->blockDim, config->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *) {
  *found = {};
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) {
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *, int, size_t) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int,
                                                                   size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}

}  // extern "C"
