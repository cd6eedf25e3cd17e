// Work shared among threads by taking the next item from a counter: whoever is free takes one.
//
// The calling thread works too, and at the end waits only for threads that are inside an item: one that the system has
// not let run costs nothing. A fixed division (OpenMP's, and so torch's parallel_for) waits for every thread's share;
// on a machine where something else held the second CPU, calls of 0.15 ms took 50 ms that way.
//
// The helper threads are few (as many as torch is told to use, less one), are started at the first call that can use
// them, and sleep between calls. Calls from several threads at once: one has the helpers, the others run alone.
#pragma once

#include <cstdint>

namespace lutgemm {

using ItemBody = void (*)(const void* context, int64_t item);

// body(context, item) for every item in [0, count), on at most `threads` threads. An exception of a body is thrown here
// once nobody is inside an item any more; items that nobody had taken yet are then left out.
void run_items(int64_t count, int threads, ItemBody body, const void* context);

template <class F>
void parallel_items(int64_t count, int threads, const F& f) {
  if (threads <= 1 || count <= 1) {
    for (int64_t item = 0; item < count; ++item) f(item);
    return;
  }
  run_items(count, threads, [](const void* context, int64_t item) { (*static_cast<const F*>(context))(item); }, &f);
}

}  // namespace lutgemm
