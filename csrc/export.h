// Marks the functions that decoder_fast/native.py may call.

#pragma once

#if defined(_WIN32)
#define DECODER_FAST_API extern "C" __declspec(dllexport)
#else
#define DECODER_FAST_API extern "C" __attribute__((visibility("default")))
#endif
