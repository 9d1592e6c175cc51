// What several operations say in the same words; decoder_fast/cpp/_common.py declares the same.

#pragma once

#include <cstdint>

namespace decoder_fast {

// Of the scale head.
enum Activation : std::int32_t { softmax = 0, softplus = 1 };

// What a kernel returns.
enum Status : std::int32_t { ok = 0, bad_count = 1, bad_label = 2, out_of_memory = 3 };

}  // namespace decoder_fast
