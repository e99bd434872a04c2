// Streams, events, and graphs with CUDA's rules of capture. All work is done when it is issued,
// so that a wait never blocks; what a wait orders is the races' business.
#include <algorithm>

#include "runtime.h"

namespace fake {
namespace {

struct Event {
  bool is_recorded = false, is_captured = false;
  cudaStream_t stream = nullptr;
  Clock clock;     // what is done when the event is
  Clock captured;  // the same within a capture
};

using GraphHandle = std::shared_ptr<Graph>;  // behind cudaGraph_t and cudaGraphExec_t

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

Event *of(cudaEvent_t event) { return reinterpret_cast<Event *>(event); }
GraphHandle *of(cudaGraph_t graph) { return reinterpret_cast<GraphHandle *>(graph); }
GraphHandle *of(cudaGraphExec_t graph) { return reinterpret_cast<GraphHandle *>(graph); }

bool is_default(cudaStream_t stream) { return uintptr_t(stream) <= 2; }

}  // namespace

bool is_capturing(cudaStream_t stream) {
  auto &capture = state().capture;
  return capture && capture->streams.count(stream);
}

// The rule of cudaThreadExchangeStreamCaptureMode for calls that could end a capture.
bool is_unsafe_call_prohibited() {
  auto &capture = state().capture;
  if (!capture || thread_mode == cudaStreamCaptureModeRelaxed) return false;
  if (capture->mode == cudaStreamCaptureModeRelaxed) return false;
  bool is_own = capture->thread == std::this_thread::get_id();
  bool is_global = capture->mode == cudaStreamCaptureModeGlobal;
  return is_own || (is_global && thread_mode == cudaStreamCaptureModeGlobal);
}

void add_node(cudaStream_t stream) {
  if (!is_capturing(stream)) return;
  Capture &capture = *state().capture;
  ++capture.graph->nodes;
  int number = stream_number(stream);
  ++tick_of(capture.clocks[number], number);
}

void add_work(std::function<int()> work) {
  state().capture->graph->work.push_back(std::move(work));
}

// CUDA would run this launch now, and leave it out of the graph: surely not what was meant.
static bool is_lost_to_capture(cudaStream_t stream) {
  return state().capture && !is_capturing(stream) && is_default(stream);
}

void launch(Kind kind, cudaStream_t stream, const char *what, size_t bytes) {
  if (is_lost_to_capture(stream)) {
    illegal(std::string("a launch on the default stream (") + what + ")");
    return;
  }
  note(kind, stream, what, bytes);
  add_node(stream);
}

}  // namespace fake

using namespace fake;

extern "C" {

// ---- for Python and the other libraries

void fake_launch(int kind, void *stream, const char *what, size_t bytes) {
  Lock lock;
  launch(Kind(kind), static_cast<cudaStream_t>(stream), what, bytes);
}

int fake_is_capturing(void *stream) {
  Lock lock;
  return is_capturing(static_cast<cudaStream_t>(stream));
}

int fake_capture(void *stream, int (*run)(void *), void (*forget)(void *), void *argument) {
  Lock lock;
  if (!is_capturing(static_cast<cudaStream_t>(stream))) return 0;
  std::shared_ptr<void> kept(argument, forget);
  add_work([run, kept] { return run(kept.get()); });
  return int(state().capture->graph->work.size());
}

// ---- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int priority) {
  Lock lock;
  static int made = 0;
  *stream = reinterpret_cast<cudaStream_t>(new Stream{++made, priority});
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
// Streams are few and stay, so that a late use of one is no use of freed memory.
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = is_default(stream) ? 0 : reinterpret_cast<Stream *>(stream)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock;
  if (is_capturing(stream)) return illegal("cudaStreamQuery");
  wait_on_host(clock_of(stream));
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock;
  if (is_capturing(stream) || (is_default(stream) && is_unsafe_call_prohibited()))
    return illegal("cudaStreamSynchronize");
  wait_on_host(clock_of(stream));
  note(STREAM_SYNC, stream, "");
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  Lock lock;
  if (state().capture) return illegal("cudaDeviceSynchronize");
  wait_for_device();
  note(DEVICE_SYNC, nullptr, "");
  return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *argument,
                                  unsigned) {
  call(stream, cudaSuccess, argument);
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *argument) {
  {
    Lock lock;
    add_node(stream);
    if (is_capturing(stream)) {
      add_work([=] { return call(argument), 0; });
      return cudaSuccess;
    }
  }
  call(argument);
  return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock;
  delete of(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  Lock lock;
  bool is_captured = is_capturing(stream);
  Clock captured = is_captured ? state().capture->clocks[stream_number(stream)] : Clock();
  *of(event) = {true, is_captured, stream, clock_of(stream), captured};
  note(EVENT_RECORD, stream, "");
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock lock;
  if (of(event)->is_captured) return fail(cudaErrorCapturedEvent, "a captured event is queried");
  if (is_unsafe_call_prohibited()) return illegal("cudaEventQuery");
  wait_on_host(of(event)->clock);
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock;
  if (is_unsafe_call_prohibited()) return illegal("cudaEventSynchronize");
  wait_on_host(of(event)->clock);
  note(EVENT_SYNC, of(event)->stream, "");
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;  // no time can be told here
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Lock lock;
  Event *found = of(event);
  if (found->is_captured && state().capture) {
    state().capture->streams.insert(stream);
    join(state().capture->clocks[stream_number(stream)], found->captured);
  } else if (is_capturing(stream) && found->is_recorded) {
    return illegal("a wait for an event that was recorded outside,");
  }
  wait_on_stream(stream, found->clock);
  note(WAIT_EVENT, stream, "");
  return cudaSuccess;
}

// ---- captures

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  Lock lock;
  static unsigned long long made = 0;
  if (is_default(stream))
    return fail(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
  if (state().capture) return fail(cudaErrorIllegalState, "two captures at a time");
  state().capture.reset(new Capture{std::make_shared<Graph>(), ++made, stream, mode,
                                    std::this_thread::get_id(), {stream}, {}, ""});
  note(CAPTURE, stream, "");
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  Lock lock;
  auto &capture = state().capture;
  if (!capture || capture->origin != stream)
    return fail(cudaErrorStreamCaptureUnmatched, "the capture began on another stream");
  auto ended = std::move(capture);
  *graph = nullptr;
  if (!ended->broken_by.empty())
    return fail(cudaErrorStreamCaptureInvalidated,
                ended->broken_by + " broke the capture of a graph");
  Clock &origin = ended->clocks[stream_number(stream)];
  for (auto &[number, clock] : ended->clocks)
    if (tick_of(clock, number) > tick_of(origin, number))
      return fail(cudaErrorStreamCaptureUnjoined,
                  "stream " + std::to_string(number) +
                      " has work that the capturing stream does not wait for");
  *graph = reinterpret_cast<cudaGraph_t>(new GraphHandle(ended->graph));
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  Lock lock;
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  Lock lock;
  cudaStreamIsCapturing(stream, status);
  bool is_active = *status == cudaStreamCaptureStatusActive;
  if (is_active && id) *id = state().capture->id;
  if (is_active && graph) *graph = reinterpret_cast<cudaGraph_t>(&state().capture->graph);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

// ---- graphs

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph,
                                          unsigned long long) {
  Lock lock;
  *made = reinterpret_cast<cudaGraphExec_t>(new GraphHandle(*of(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  GraphHandle graph;
  {
    Lock lock;
    if (is_capturing(stream)) return illegal("the launch of another graph");
    graph = *of(exec);
    launch(GRAPH_LAUNCH, stream, "");
    note(GRAPH_NODES, stream, "", 0, graph->nodes);
    std::string race = touch_by_graph(*graph, stream);
    if (!race.empty()) return fail(cudaErrorLaunchFailure, race);
  }
  // Without the lock: a part of the work calls Python, whose lock another thread may hold while
  // it waits for ours.
  for (auto &work : graph->work)
    if (int error = work())
      return fail(cudaErrorLaunchFailure,
                  "a replayed operation failed (" + std::to_string(error) + "), see above");
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
  *count = size_t((*of(graph))->nodes);
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t *, cudaGraphEdgeData *,
                                         size_t *count) {
  *count = 0;
  return cudaSuccess;
}
// Graphs are destroyed without the lock, for the same reason: `forget` may call Python.
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete of(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete of(graph), cudaSuccess; }
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char *, unsigned) { return cudaSuccess; }

}  // extern "C"
