// Counts, the trace, and errors with words.
#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "runtime.h"

namespace fake {
namespace {

const char *NAMES[KINDS] = {
    "kernel", "product", "nccl", "h2d", "d2h", "d2d", "memset", "pageable_h2d", "pageable_d2h",
    "stream_sync", "device_sync", "event_sync", "memcpy_sync", "event_record", "wait_event",
    "malloc", "free", "map", "unmap", "host_alloc", "host_register", "host_unregister",
    "capture", "graph_launch", "graph_nodes", "illegal"};

long counts[KINDS], bytes_of[KINDS], sequence = 0;

// FAKE_GPU_TRACE=PREFIX: each process that uses the device writes PREFIX.PID.
FILE *trace() {
  static FILE *file = nullptr;
  static pid_t owner = 0;
  static const char *prefix = getenv("FAKE_GPU_TRACE");
  if (prefix && owner != getpid()) {
    owner = getpid();
    file = fopen((std::string(prefix) + "." + std::to_string(owner)).c_str(), "w");
  }
  return file;
}

thread_local cudaError_t last = cudaSuccess, told = cudaSuccess;
thread_local std::string told_text;

}  // namespace

int stream_number(cudaStream_t stream) {
  bool is_default = uintptr_t(stream) <= 2;  // null, legacy, per thread
  return is_default ? 0 : reinterpret_cast<Stream *>(stream)->id;
}

void note(Kind kind, cudaStream_t stream, const char *what, size_t bytes, long number) {
  counts[kind] += number;
  bytes_of[kind] += long(bytes);
  ++sequence;
  if (FILE *file = trace())
    fprintf(file, "%ld\t%s\t%d\t%d\t%zu\t%s\n", sequence, NAMES[kind], stream_number(stream),
            int(is_capturing(stream)), bytes, what);
}

cudaError_t fail(cudaError_t code, const std::string &text) {
  last = told = code;
  told_text = text;
  return code;
}

cudaError_t illegal(const std::string &what) {
  note(ILLEGAL, nullptr, what.c_str());
  if (state().capture && state().capture->broken_by.empty()) state().capture->broken_by = what;
  return fail(cudaErrorStreamCaptureUnsupported, what + " during the capture of a graph");
}

}  // namespace fake

using namespace fake;

extern "C" {

const char *fake_kind(int kind) { return kind < KINDS ? NAMES[kind] : nullptr; }

void fake_counts(long *numbers, long *bytes) {
  Lock lock;
  memcpy(numbers, counts, sizeof counts);
  memcpy(bytes, bytes_of, sizeof bytes_of);
}

void fake_mark(const char *text) {
  Lock lock;
  if (FILE *file = trace()) {
    fprintf(file, "%ld\tmark\t0\t0\t0\t%s\n", sequence, text);
    fflush(file);
  }
}

const char *cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    default: return "cudaError";
  }
}

// torch puts this text into its exception.
const char *cudaGetErrorString(cudaError_t code) {
  static thread_local std::string text;
  text = code == told ? "stand-in CUDA: " + told_text
                      : "stand-in CUDA: error " + std::to_string(int(code));
  return text.c_str();
}

cudaError_t cudaGetLastError() {
  cudaError_t code = last;
  last = cudaSuccess;
  return code;
}

cudaError_t cudaPeekAtLastError() { return last; }

}  // extern "C"
