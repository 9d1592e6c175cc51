// Loops over items on several threads.

#pragma once

#include <cstdint>

namespace decoder_fast {

// Calls body(context, item, worker) once for every item in 0..n_items - 1, on up to n_threads
// threads; worker, in 0..n_threads - 1, names the thread. Items go to threads as these come free:
// what an item computes must not depend on its worker.
void parallel_for(std::int64_t n_items, int n_threads,
                  void (*body)(void* context, std::int64_t item, int worker), void* context);

// The same for a function object.
template <class Body>
void parallel_for(std::int64_t n_items, int n_threads, Body& body) {
    parallel_for(
        n_items, n_threads,
        [](void* context, std::int64_t item, int worker) {
            (*static_cast<Body*>(context))(item, worker);
        },
        &body);
}

}  // namespace decoder_fast
