// Races: vector clocks over streams, events and the host's waits, and the last accesses to every
// range of memory. An access that nothing orders after an earlier one is named, with both ends.
//
// Clock c of a stream says: all work of stream s up to tick c[s] is done before its next work
// begins. The host's clock says what the host has waited for; work is issued after that.
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace fake {

void join(Clock &clock, const Clock &other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

long &tick_of(Clock &clock, int stream) {
  if (clock.size() <= size_t(stream)) clock.resize(size_t(stream) + 1);
  return clock[size_t(stream)];
}

namespace {

bool is_watching_now = getenv("FAKE_GPU_RACES") && atoi(getenv("FAKE_GPU_RACES"));

std::map<int, Clock> streams;
Clock host;

struct Access {
  int stream;
  long tick;
  std::string what;
};

struct Interval {
  uintptr_t end;
  bool is_written;
  Access write;                 // the last one
  std::map<int, Access> reads;  // since then, the last one of each stream
};

std::map<uintptr_t, Interval> history;  // start -> interval, without overlap

bool covers(const Clock &clock, const Access &access) {
  return size_t(access.stream) < clock.size() && clock[size_t(access.stream)] >= access.tick;
}

Clock &next_tick(int stream) {
  Clock &clock = streams[stream];
  join(clock, host);
  ++tick_of(clock, stream);
  return clock;
}

// NCCL's watchdog polls events at times of its own, and tells no other thread what it has seen.
bool is_watchdog() {
  static thread_local const bool found = [] {
    char name[32] = "";
    pthread_getname_np(pthread_self(), name, sizeof name);
    return strncmp(name, "pt_nccl", 7) == 0;
  }();
  return found;
}

std::string conflict(const std::string &by, const char *does, const Access &earlier,
                     const char *did) {
  return "race: " + by + " " + does + " memory that " + earlier.what + " on stream " +
         std::to_string(earlier.stream) + " " + did + ", and does not wait for it";
}

std::string check(const Clock &clock, uintptr_t start, uintptr_t end, bool is_write,
                  const std::string &by) {
  const char *does = is_write ? "writes" : "reads";
  auto at = history.upper_bound(start);
  if (at != history.begin() && std::prev(at)->second.end > start) --at;
  for (; at != history.end() && at->first < end; ++at) {
    Interval &interval = at->second;
    if (interval.is_written && !covers(clock, interval.write))
      return conflict(by, does, interval.write, "wrote");
    if (!is_write) continue;
    for (auto &[stream, read] : interval.reads)
      if (!covers(clock, read)) return conflict(by, does, read, "read");
  }
  return "";
}

void split(uintptr_t at) {
  auto found = history.upper_bound(at);
  if (found == history.begin()) return;
  --found;
  if (found->first >= at || found->second.end <= at) return;
  Interval rest = found->second;
  found->second.end = at;
  history.emplace(at, std::move(rest));
}

void forget_range(uintptr_t start, uintptr_t end) {
  split(start);
  split(end);
  history.erase(history.lower_bound(start), history.lower_bound(end));
}

void record(uintptr_t start, uintptr_t end, bool is_write, const Access &access) {
  if (is_write) {
    forget_range(start, end);
    history[start] = {end, true, access, {}};
    return;
  }
  split(start);
  split(end);
  for (uintptr_t at = start; at < end;) {
    auto found = history.lower_bound(at);
    uintptr_t gap_end = found == history.end() ? end : std::min(end, found->first);
    if (gap_end > at) found = history.emplace(at, Interval{gap_end, false, {}, {}}).first;
    found->second.reads[access.stream] = access;
    at = found->second.end;
  }
}

thread_local std::string label;

std::string touch_on(int stream, const Touch &t) {
  uintptr_t start = uintptr_t(t.address), end = start + t.size;
  Clock &clock = next_tick(stream);
  std::string by = t.what + " on stream " + std::to_string(stream);
  std::string found = check(clock, start, end, t.is_write, by);
  record(start, end, t.is_write, {stream, clock[size_t(stream)], t.what});
  return found;
}

}  // namespace

std::string touch(cudaStream_t stream, const void *address, size_t size, bool is_write,
                  const std::string &what) {
  bool is_seen = is_watching_now && size && (is_device(address) || is_pinned(address));
  if (!is_seen) return "";
  Touch t{address, size, is_write, what.empty() ? label : what};
  if (!what.empty() && !label.empty()) t.what += " (" + label + ")";
  if (!is_capturing(stream)) return touch_on(stream_number(stream), t);
  state().capture->graph->touches.push_back(std::move(t));
  return "";
}

std::string touch_by_graph(const Graph &graph, cudaStream_t stream) {
  if (!is_watching_now) return "";
  for (auto &t : graph.touches) {
    Touch replayed = t;
    replayed.what = "a graph's " + t.what;
    std::string found = touch_on(stream_number(stream), replayed);
    if (!found.empty()) return found;
  }
  return "";
}

std::string touch_by_host(const void *address, size_t size, bool is_write,
                          const std::string &what) {
  if (!is_watching_now || !size || !is_pinned(address)) return "";
  uintptr_t start = uintptr_t(address);
  return check(host, start, start + size, is_write, what + " on the host");
}

void forget_touches(const void *address, size_t size) {
  if (is_watching_now) forget_range(uintptr_t(address), uintptr_t(address) + size);
}

Clock clock_of(cudaStream_t stream) {
  if (!is_watching_now) return {};
  Clock &clock = streams[stream_number(stream)];
  join(clock, host);
  return clock;
}

void wait_on_stream(cudaStream_t stream, const Clock &clock) {
  if (is_watching_now) join(streams[stream_number(stream)], clock);
}

void wait_on_host(const Clock &clock) {
  if (is_watching_now && !is_watchdog()) join(host, clock);
}

void wait_for_device() {
  for (auto &[stream, clock] : streams) wait_on_host(clock);
}

}  // namespace fake

using namespace fake;

extern "C" {

void fake_watch_races(int is_on) {
  Lock lock;
  is_watching_now = is_on;
  history.clear();
}

int fake_is_watching() { return is_watching_now; }

void fake_label(const char *text) { label = text; }

const char *fake_touch(void *stream, const void *address, size_t size, int is_write,
                       const char *what) {
  static thread_local std::string found;
  Lock lock;
  found = touch(static_cast<cudaStream_t>(stream), address, size, is_write, what);
  return found.empty() ? nullptr : found.c_str();
}

const char *fake_touch_by_host(const void *address, size_t size, int is_write, const char *what) {
  static thread_local std::string found;
  Lock lock;
  found = touch_by_host(address, size, is_write, what);
  return found.empty() ? nullptr : found.c_str();
}

}  // extern "C"
