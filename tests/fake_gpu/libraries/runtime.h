// State of the stand-in CUDA runtime (libcudart): one device, its memory, streams and counts.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "stand_in.h"

namespace fake {

// The first three as in stand_in.h; names in counters.cpp, in this order.
enum Kind {
  KERNEL, PRODUCT, NCCL, H2D, D2H, D2D, MEMSET, PAGEABLE_H2D, PAGEABLE_D2H,
  STREAM_SYNC, DEVICE_SYNC, EVENT_SYNC, MEMCPY_SYNC, EVENT_RECORD, WAIT_EVENT,
  MALLOC, FREE, MAP, UNMAP, HOST_ALLOC, HOST_REGISTER, HOST_UNREGISTER,
  CAPTURE, GRAPH_LAUNCH, GRAPH_NODES, ILLEGAL, KINDS
};

using Clock = std::vector<long>;  // by stream number, see races.cpp

struct Touch {  // an access of memory
  const void *address;
  size_t size;
  bool is_write;
  std::string what;
};

struct Graph {
  long nodes = 0;                         // what CUDA would have in it
  std::vector<std::function<int()>> work; // what a replay does here, in order
  std::vector<Touch> touches;             // what a replay reads and writes
};

struct Capture {
  std::shared_ptr<Graph> graph;
  unsigned long long id;
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  std::set<cudaStream_t> streams; // the origin and those that joined by an event
  std::map<int, Clock> clocks;    // by stream number: what comes before its next work
  std::string broken_by;  // the first illegal call; empty while all is well
};

struct Stream { int id, priority; };

struct HostRange { size_t size; bool is_registered; };

struct State {
  State();
  std::recursive_mutex mutex;
  // Device memory is [device_base, device_base + SPACE), never accessible, so that host code that
  // follows a device pointer faults, as it would on a GPU. Byte i of it lies at real_base + i.
  char *device_base, *real_base;
  size_t capacity, used = 0, peak = 0;
  bool has_values;
  std::map<size_t, size_t> ranges; // offset -> size: addresses that are taken
  std::map<size_t, size_t> live;   // offset -> size: addresses with memory behind them
  std::map<uintptr_t, HostRange> hosts; // pinned host memory
  std::unique_ptr<Capture> capture;
};

constexpr size_t SPACE = size_t(8) << 40;

State &state();

struct Lock {
  std::lock_guard<std::recursive_mutex> guard{state().mutex};
};

// Counters and errors (counters.cpp)
void note(Kind kind, cudaStream_t stream, const char *what, size_t bytes = 0, long number = 1);
cudaError_t fail(cudaError_t code, const std::string &text);
cudaError_t illegal(const std::string &what);  // breaks the capture
int stream_number(cudaStream_t stream);

// Memory (memory.cpp)
bool is_device(const void *address);
char *real_of(const void *address);
bool is_pinned(const void *address);
bool holds_copies();

// Captures (streams.cpp)
bool is_capturing(cudaStream_t stream);
bool is_unsafe_call_prohibited();
void launch(Kind kind, cudaStream_t stream, const char *what, size_t bytes = 0);
void add_node(cudaStream_t stream);
void add_work(std::function<int()> work);  // of the current capture

// Races (races.cpp): each `touch` returns the description of a race, or an empty string.
void join(Clock &clock, const Clock &other);
long &tick_of(Clock &clock, int stream);
std::string touch(cudaStream_t stream, const void *address, size_t size, bool is_write,
                  const std::string &what);
std::string touch_by_graph(const Graph &graph, cudaStream_t stream);
std::string touch_by_host(const void *address, size_t size, bool is_write, const std::string &what);
void forget_touches(const void *address, size_t size);
Clock clock_of(cudaStream_t stream);
void wait_on_stream(cudaStream_t stream, const Clock &clock);
void wait_on_host(const Clock &clock);
void wait_for_device();

}  // namespace fake
