#include "parallel.h"

#include <atomic>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace decoder_fast {
namespace {

constexpr int most_threads = 256;

// Each worker starts with a share of its own, the same at every loop of as many items, because what
// it worked on in the loop before is still in its cache; then it helps the others.
struct Loop {
    std::int64_t n_items;
    int n_threads;
    void (*body)(void*, std::int64_t, int);
    void* context;
    std::atomic<int> next_worker{0};
    std::atomic<std::int64_t> next_item[most_threads];

    std::int64_t share_start(int worker) const { return n_items * worker / n_threads; }
};

using ThreadNumber = int (*)();

void work(Loop& loop, int worker) {
    for (int k = 0; k < loop.n_threads; ++k) {
        const int share = (worker + k) % loop.n_threads;
        const std::int64_t end = loop.share_start(share + 1);
        for (;;) {
            const std::int64_t item = loop.next_item[share].fetch_add(1);
            if (item >= end) break;
            loop.body(loop.context, item, worker);
        }
    }
}

void work_as_it_comes(void* argument) {
    Loop& loop = *static_cast<Loop*>(argument);
    work(loop, loop.next_worker.fetch_add(1));
}

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch has loaded, by the entries that both GNU's and LLVM's offer. Its
// threads are awake when torch has just used them; a second pool would fight with them for cores.
struct OpenMP {
    Team team = nullptr;
    ThreadNumber thread_number = nullptr;
};

OpenMP find_openmp() {
    OpenMP found;
#if !defined(_WIN32)
    found.team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    if (found.thread_number == nullptr) found.team = nullptr;
#endif
    return found;
}

const OpenMP& openmp() {
    static const OpenMP found = find_openmp();
    return found;
}

void work_in_team(void* argument) {
    work(*static_cast<Loop*>(argument), openmp().thread_number());
}

}  // namespace

void parallel_for(std::int64_t n_items, int n_threads,
                  void (*body)(void* context, std::int64_t item, int worker), void* context) {
    const std::int64_t limit = n_items < most_threads ? n_items : most_threads;
    const int n = static_cast<int>(n_threads < limit ? n_threads : limit);
    if (n <= 1) {
        for (std::int64_t item = 0; item < n_items; ++item) body(context, item, 0);
        return;
    }
    Loop loop;
    loop.n_items = n_items;
    loop.n_threads = n;
    loop.body = body;
    loop.context = context;
    for (int i = 0; i < n; ++i) loop.next_item[i] = loop.share_start(i);
    if (openmp().team != nullptr) {
        // A team may be smaller than asked for; its members then do the other shares too.
        openmp().team(work_in_team, &loop, static_cast<unsigned>(n), 0);
        return;
    }
    std::vector<std::thread> threads;
    for (int i = 1; i < n; ++i) {
        try {
            threads.emplace_back(work_as_it_comes, &loop);
        } catch (...) {
            break;  // no more threads to be had: those there are do the work
        }
    }
    work_as_it_comes(&loop);
    for (std::thread& thread : threads) thread.join();
}

}  // namespace decoder_fast
