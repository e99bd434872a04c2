// The management library: as much as torch's allocator asks of it for expandable segments.
//
// nvmlInit is left out on purpose, so that torch counts devices by the runtime.
#include <cstddef>

namespace {
constexpr int SUCCESS = 0, NOT_SUPPORTED = 3;
int device;
}  // namespace

extern "C" {

int nvmlInit_v2() { return SUCCESS; }

int nvmlDeviceGetHandleByPciBusId_v2(const char *, void **handle) {
  return *handle = &device, SUCCESS;
}

// The caller's zeros stay: no fabric, so memory is not shared over one.
int nvmlDeviceGetGpuFabricInfoV(void *, void *) { return SUCCESS; }

int nvmlDeviceGetComputeRunningProcesses(void *, unsigned *count, void *) {
  return *count = 0, SUCCESS;
}

// Looked up together with the others.
int nvmlDeviceGetNvLinkRemoteDeviceType() { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2() { return NOT_SUPPORTED; }
int nvmlSystemGetCudaDriverVersion_v2() { return NOT_SUPPORTED; }

}  // extern "C"
