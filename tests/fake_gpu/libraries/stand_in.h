// What the stand-in libraries offer each other and Python: plain C, no CUDA headers.
#pragma once
#include <cstddef>

extern "C" {
// Counting. Kinds are numbered from 0; `fake_kind` gives a kind's name, null after the last.
const char *fake_kind(int kind);
void fake_counts(long *counts, long *bytes);
void fake_launch(int kind, void *stream, const char *what, size_t bytes);
void fake_mark(const char *text);

// Device memory. `fake_host_address` is null unless all `size` bytes at `address` are allocated.
void *fake_host_address(const void *address, size_t size);
void *fake_address_base(void);
void *fake_host_base(void);  // byte i of the device lies at byte i from here
size_t fake_address_space(void);
size_t fake_used(void);
size_t fake_peak(void);
void fake_reset_peak(void);

// Values. Copies of a thread that holds them back move no bytes: Python computes the result.
int fake_has_values(void);
void fake_hold_copies(int hold);

// Graphs. Inside a capture of `stream`, `fake_capture` keeps `run(argument)` for every replay and
// returns its place in the graph, from 1; outside it returns 0. `forget(argument)` is called when
// the graph is destroyed.
int fake_is_capturing(void *stream);
int fake_capture(void *stream, int (*run)(void *), void (*forget)(void *), void *argument);

// Races: a description of one, or null. `fake_label` names what this thread does from now on.
void fake_watch_races(int is_on);
int fake_is_watching(void);
void fake_label(const char *text);
const char *fake_touch(void *stream, const void *address, size_t size, int is_write,
                       const char *what);
const char *fake_touch_by_host(const void *address, size_t size, int is_write, const char *what);

// Virtual memory, for the driver: 0, or 2 (CUDA_ERROR_OUT_OF_MEMORY), or 1 (INVALID_VALUE).
int fake_reserve(void **address, size_t size);
int fake_unreserve(void *address, size_t size);
int fake_create(unsigned long long *handle, size_t size);
int fake_release(unsigned long long handle);
int fake_map(void *address, size_t size, unsigned long long handle);
int fake_unmap(void *address, size_t size);
int fake_range_of(void **base, size_t *size, const void *address);
}

enum { FAKE_KERNEL, FAKE_PRODUCT, FAKE_NCCL };  // the kinds that other libraries launch
