// Memory: addresses, allocations, pinned host memory, copies, and mapped (virtual) memory.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace fake {
namespace {

constexpr size_t PAGE = size_t(2) << 20;  // of the device

char *reserve_host(int protection) {
  void *base = mmap(nullptr, SPACE, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    perror("stand-in CUDA: no address space for the device's memory");
    abort();
  }
  madvise(base, SPACE, MADV_DONTDUMP);
  return static_cast<char *>(base);
}

size_t rounded(size_t size) { return (size + PAGE - 1) / PAGE * PAGE; }

std::string gigabytes(size_t bytes) {
  char text[32];
  snprintf(text, sizeof text, "%.3f GB", double(bytes) / 1e9);
  return text;
}

cudaError_t charge(size_t size) {
  State &s = state();
  if (s.used + size > s.capacity)
    return fail(cudaErrorMemoryAllocation, "out of memory: " + gigabytes(size) + " asked for, " +
                                               gigabytes(s.capacity - s.used) + " of " +
                                               gigabytes(s.capacity) + " free");
  s.used += size;
  s.peak = std::max(s.peak, s.used);
  return cudaSuccess;
}

size_t take_addresses(size_t size) {  // first fit; offset 0 stays free, so that no address is null
  size_t at = PAGE;
  for (auto &[offset, taken] : state().ranges) {
    if (offset >= at + size) break;
    at = offset + taken;
  }
  state().ranges[at] = size;
  return at;
}

size_t offset_of(const void *address) {
  return size_t(static_cast<const char *>(address) - state().device_base);
}

// The entry of `ranges` that contains the offset, or its end.
std::map<size_t, size_t>::iterator entry_of(std::map<size_t, size_t> &ranges, size_t offset) {
  auto found = ranges.upper_bound(offset);
  if (found == ranges.begin()) return ranges.end();
  --found;
  return offset < found->first + found->second ? found : ranges.end();
}

void drop_content(size_t offset, size_t size) {
  madvise(state().real_base + offset, size, MADV_DONTNEED);
}

thread_local bool hold = false;

}  // namespace

State::State() {
  device_base = reserve_host(PROT_NONE);
  real_base = reserve_host(PROT_READ | PROT_WRITE);
  const char *size = getenv("FAKE_GPU_GB");
  capacity = size ? size_t(atof(size) * 1e9) : size_t(80) << 30;
  const char *values = getenv("FAKE_GPU_VALUES");
  has_values = !values || atoi(values);
}

State &state() {
  static State *made = new State;  // never destroyed: other libraries' destructors come late
  return *made;
}

bool is_device(const void *address) {
  auto *at = static_cast<const char *>(address);
  return at >= state().device_base && at < state().device_base + SPACE;
}

char *real_of(const void *address) {
  if (is_device(address)) return state().real_base + offset_of(address);
  return const_cast<char *>(static_cast<const char *>(address));
}

bool is_pinned(const void *address) {
  auto &hosts = state().hosts;
  auto found = hosts.upper_bound(uintptr_t(address));
  if (found == hosts.begin()) return false;
  --found;
  return uintptr_t(address) < found->first + found->second.size;
}

bool holds_copies() { return hold; }

namespace {

constexpr size_t LARGE_COPY = 1 << 20;

// One copy; each of the three decides alone: counts, the rules of captures, and the bytes.
cudaError_t copy(void *to, const void *from, size_t size, cudaStream_t stream, bool is_blocking) {
  Lock lock;
  State &s = state();
  bool writes_device = is_device(to), reads_device = is_device(from);
  Kind kind = writes_device == reads_device ? D2D : writes_device ? H2D : D2H;
  if (s.capture && is_blocking) return illegal("cudaMemcpy");
  if (s.capture && uintptr_t(stream) <= 1) return illegal("a copy on the default stream");
  for (const void *end : {static_cast<const void *>(to), from})
    if (size && is_device(end) && !fake_host_address(end, size))
      return fail(cudaErrorInvalidValue, "a copy touches device memory that is not allocated");
  if (is_blocking) note(MEMCPY_SYNC, stream, "", size);
  launch(kind, stream, "", size);
  if (kind == H2D && !is_pinned(from)) note(PAGEABLE_H2D, stream, "", size);
  if (kind == D2H && !is_pinned(to)) note(PAGEABLE_D2H, stream, "", size);
  std::string race = touch(stream, from, size, false, "a copy");
  if (race.empty()) race = touch(stream, to, size, true, "a copy");
  if (!race.empty()) return fail(cudaErrorLaunchFailure, race);
  bool waits = is_blocking || (kind == D2H && !is_pinned(to));
  if (waits && !is_capturing(stream)) wait_on_host(clock_of(stream));
  if (hold) return cudaSuccess;
  if (!s.has_values) {
    // large pinned memory (the arenas of parts) stays untouched, so that it takes no memory here
    bool is_made = size < LARGE_COPY || !is_pinned(to);
    if (kind == D2H && is_made && !is_capturing(stream)) memset(to, 0, size);
    return cudaSuccess;
  }
  char *target = real_of(to), *source = real_of(from);
  auto move = [=] { return memmove(target, source, size), 0; };
  if (is_capturing(stream)) add_work(move);
  else move();
  return cudaSuccess;
}

cudaError_t fill(void *to, int value, size_t size, cudaStream_t stream) {
  Lock lock;
  if (is_device(to) && !fake_host_address(to, size))
    return fail(cudaErrorInvalidValue, "a fill touches device memory that is not allocated");
  launch(MEMSET, stream, "", size);
  std::string race = touch(stream, to, size, true, "a fill");
  if (!race.empty()) return fail(cudaErrorLaunchFailure, race);
  if (hold || !state().has_values) return cudaSuccess;
  char *target = real_of(to);
  auto set = [=] { return memset(target, value, size), 0; };
  if (is_capturing(stream)) add_work(set);
  else set();
  return cudaSuccess;
}

}  // namespace
}  // namespace fake

using namespace fake;

extern "C" {

// ---- for Python and the other libraries

void *fake_address_base() { return state().device_base; }
void *fake_host_base() { return state().real_base; }
size_t fake_address_space() { return SPACE; }
size_t fake_used() { return state().used; }
size_t fake_peak() { return state().peak; }
void fake_reset_peak() { state().peak = state().used; }
int fake_has_values() { return state().has_values; }
void fake_hold_copies(int value) { hold = value; }

void *fake_host_address(const void *address, size_t size) {
  Lock lock;
  if (!is_device(address)) return nullptr;
  size_t offset = offset_of(address), end = offset + size, at = offset;
  do {
    auto found = entry_of(state().live, at);
    if (found == state().live.end()) return nullptr;
    at = found->first + found->second;
  } while (at < end);
  return state().real_base + offset;
}

// ---- device memory

cudaError_t cudaMalloc(void **address, size_t size) {
  Lock lock;
  if (is_unsafe_call_prohibited()) return illegal("cudaMalloc");
  size_t whole = rounded(size);
  if (cudaError_t error = charge(whole)) return error;
  size_t offset = take_addresses(whole);
  state().live[offset] = whole;
  *address = state().device_base + offset;
  note(MALLOC, nullptr, "", size);
  return cudaSuccess;
}

cudaError_t cudaFree(void *address) {
  Lock lock;
  if (!address) return cudaSuccess;
  if (is_unsafe_call_prohibited()) return illegal("cudaFree");
  State &s = state();
  auto found = s.live.find(offset_of(address));
  if (found == s.live.end())
    return fail(cudaErrorInvalidValue, "cudaFree of what cudaMalloc did not return");
  auto [offset, size] = *found;
  wait_for_device();
  forget_touches(address, size);
  drop_content(offset, size);
  s.used -= size;
  s.live.erase(offset);
  s.ranges.erase(offset);
  note(FREE, nullptr, "", size);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t) {
  return cudaMalloc(address, size);
}
cudaError_t cudaFreeAsync(void *address, cudaStream_t) { return cudaFree(address); }

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = state().capacity - state().used;
  *total = state().capacity;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *found, const void *address) {
  Lock lock;
  memset(found, 0, sizeof *found);
  void *plain = const_cast<void *>(address);
  if (is_device(address)) {
    found->type = cudaMemoryTypeDevice;
    found->devicePointer = plain;
  } else if (is_pinned(address)) {
    found->type = cudaMemoryTypeHost;
    found->devicePointer = found->hostPointer = plain;
  } else {
    found->type = cudaMemoryTypeUnregistered;
    found->device = -2;
    found->hostPointer = plain;
  }
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *) { return cudaMalloc(address, 4096); }

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int) {
  static int only;
  *pool = reinterpret_cast<cudaMemPool_t>(&only);
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *value) {
  *static_cast<uint64_t *>(value) = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc *, size_t) {
  return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// ---- pinned host memory

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned) {
  Lock lock;
  if (is_unsafe_call_prohibited()) return illegal("cudaHostAlloc");
  void *made = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "out of host memory");
  state().hosts[uintptr_t(made)] = {size, false};
  *address = made;
  note(HOST_ALLOC, nullptr, "", size);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void *address) {
  Lock lock;
  if (is_unsafe_call_prohibited()) return illegal("cudaFreeHost");
  auto found = state().hosts.find(uintptr_t(address));
  if (found == state().hosts.end() || found->second.is_registered)
    return fail(cudaErrorInvalidValue, "cudaFreeHost of what cudaHostAlloc did not return");
  std::string race = touch_by_host(address, found->second.size, true, "cudaFreeHost");
  if (!race.empty()) return fail(cudaErrorInvalidValue, race);
  forget_touches(address, found->second.size);
  munmap(address, found->second.size);
  state().hosts.erase(found);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void *address, size_t size, unsigned) {
  Lock lock;
  if (is_unsafe_call_prohibited()) return illegal("cudaHostRegister");
  if (is_pinned(address))
    return fail(cudaErrorHostMemoryAlreadyRegistered, "host memory is registered already");
  state().hosts[uintptr_t(address)] = {size, true};
  note(HOST_REGISTER, nullptr, "", size);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) {
  Lock lock;
  if (is_unsafe_call_prohibited()) return illegal("cudaHostUnregister");
  auto found = state().hosts.find(uintptr_t(address));
  if (found == state().hosts.end() || !found->second.is_registered)
    return fail(cudaErrorHostMemoryNotRegistered, "host memory is not registered");
  std::string race = touch_by_host(address, found->second.size, true, "cudaHostUnregister");
  if (!race.empty()) return fail(cudaErrorInvalidValue, race);
  forget_touches(address, found->second.size);
  note(HOST_UNREGISTER, nullptr, "", found->second.size);
  state().hosts.erase(found);
  return cudaSuccess;
}

// ---- copies

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
  return copy(to, from, size, nullptr, true);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy(to, from, size, stream, false);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size,
                                cudaStream_t stream) {
  return copy(to, from, size, stream, false);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) {
    void *target = static_cast<char *>(to) + row * to_pitch;
    const void *source = static_cast<const char *>(from) + row * from_pitch;
    if (cudaError_t error = copy(target, source, width, stream, false)) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;  // constants of kernels, which do not run
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return fill(to, value, size, nullptr); }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  return fill(to, value, size, stream);
}

// ---- mapped memory. A handle is charged when it is created; its content does not outlive its
// mapping, since nothing here maps one handle at a second address.

struct Physical {
  size_t size;
  int mappings;
  bool is_released;
};
static std::map<unsigned long long, Physical> physical;
static std::map<size_t, unsigned long long> handle_at;  // offset of a mapping -> its handle

static void discharge(unsigned long long handle) {
  auto found = physical.find(handle);
  if (!found->second.is_released || found->second.mappings) return;
  state().used -= found->second.size;
  physical.erase(found);
}

int fake_reserve(void **address, size_t size) {
  Lock lock;
  *address = state().device_base + take_addresses(rounded(size));
  return 0;
}

int fake_unreserve(void *address, size_t) {
  Lock lock;
  return state().ranges.erase(offset_of(address)) ? 0 : 1;
}

int fake_create(unsigned long long *handle, size_t size) {
  Lock lock;
  static unsigned long long next = 1;
  if (charge(size)) return cudaGetLastError(), 2;  // the driver's errors are not the runtime's
  physical[next] = {size, 0, false};
  *handle = next++;
  note(MALLOC, nullptr, "cuMemCreate", size);
  return 0;
}

int fake_release(unsigned long long handle) {
  Lock lock;
  auto found = physical.find(handle);
  if (found == physical.end() || found->second.is_released) return 1;
  note(FREE, nullptr, "cuMemRelease", found->second.size);
  found->second.is_released = true;
  discharge(handle);
  return 0;
}

int fake_map(void *address, size_t size, unsigned long long handle) {
  Lock lock;
  auto found = physical.find(handle);
  size_t offset = offset_of(address);
  if (found == physical.end() || found->second.size != size || found->second.mappings) return 1;
  if (entry_of(state().ranges, offset) == state().ranges.end()) return 1;
  if (entry_of(state().live, offset) != state().live.end()) return 1;
  ++found->second.mappings;
  state().live[offset] = size;
  handle_at[offset] = handle;
  note(MAP, nullptr, "", size);
  return 0;
}

int fake_unmap(void *address, size_t size) {
  Lock lock;
  size_t offset = offset_of(address), end = offset + size;
  if (is_unsafe_call_prohibited()) return illegal("cuMemUnmap"), 900;
  while (offset < end) {
    auto found = handle_at.find(offset);
    if (found == handle_at.end()) return 1;
    size_t length = state().live[offset];
    unsigned long long handle = found->second;
    forget_touches(state().device_base + offset, length);
    drop_content(offset, length);
    state().live.erase(offset);
    handle_at.erase(found);
    note(UNMAP, nullptr, "", length);
    --physical[handle].mappings;
    discharge(handle);
    offset += length;
  }
  return 0;
}

int fake_range_of(void **base, size_t *size, const void *address) {
  Lock lock;
  auto found = entry_of(state().live, offset_of(address));
  if (found == state().live.end()) return 1;
  if (base) *base = state().device_base + found->first;
  if (size) *size = found->second;
  return 0;
}

}  // extern "C"
