#include "workspace.h"

#include <cstdlib>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace decoder_fast {
namespace {

struct Kept {
    std::mutex mutex;
    void* memory = nullptr;
    std::size_t size = 0;
};

constexpr std::size_t large = std::size_t{1} << 22;
constexpr std::size_t most_kept = std::size_t{1} << 27;

Kept& kept(std::size_t size) {
    static Kept* const instances = new Kept[2];  // never destroyed: threads may outlive main
    return instances[size >= large ? 1 : 0];
}

constexpr std::size_t huge_page = std::size_t{1} << 21;

void* allocate(std::size_t size) {
#if defined(_WIN32)
    return _aligned_malloc(size, 64);
#else
    void* memory = nullptr;
    const std::size_t alignment = size >= huge_page ? huge_page : 64;
    if (posix_memalign(&memory, alignment, size) != 0) return nullptr;
#if defined(__linux__)
    if (size >= huge_page) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
#endif
}

void release(void* memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

}  // namespace

Workspace::Workspace(std::size_t size) : memory(nullptr), size_(size) {
    Kept& k = kept(size);
    {
        const std::lock_guard<std::mutex> lock(k.mutex);
        if (k.memory != nullptr && k.size >= size && k.size / 4 <= size) {
            memory = k.memory;
            size_ = k.size;
            k.memory = nullptr;
        }
    }
    if (memory == nullptr) memory = allocate(size);
}

Workspace::~Workspace() {
    Kept& k = kept(size_);
    void* unused = memory;
    if (memory != nullptr && size_ <= most_kept) {
        const std::lock_guard<std::mutex> lock(k.mutex);
        unused = k.memory;
        k.memory = memory;
        k.size = size_;
    }
    if (unused != nullptr) release(unused);
}

}  // namespace decoder_fast
