// Memory that one call needs and the next one can use again.

#pragma once

#include <cstddef>

namespace decoder_fast {

// Memory aligned to cache lines, or null if there is none. The last one given back is kept, of the
// small ones and of the large ones, so that a training loop does not have the system map the same
// pages anew at every step, and its small operations do not displace what the large ones need.
class Workspace {
  public:
    explicit Workspace(std::size_t size);
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    void* memory;

  private:
    std::size_t size_;
};

}  // namespace decoder_fast
