// What the kernels include, before the compiler is told to use an instruction set.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "parallel.h"
#include "workspace.h"
