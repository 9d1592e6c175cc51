#!/usr/bin/env bash
# Runs the tests of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer:
#
#     tests/sanitize.sh [arguments of pytest]     PYTHON and CXX choose interpreter and compiler
#
# The sanitized library lies in a copy of the package in a temporary folder. Everything that the
# kernels or torch allocate is watched to the byte, and is filled with NaN before it is handed out.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
cxx=${CXX:-g++}
[ $# -gt 0 ] || set -- tests/test_*_native.py tests/test_softmax_library.py \
    tests/test_covariate_linear.py tests/test_csr_linear.py

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r decoder_fast triton_kernels csrc tests pyproject.toml "$folder"
cd "$folder"
# Division by zero stays allowed: kernels use IEEE 754's infinities.
$cxx -std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -fPIC -fvisibility=hidden \
    -shared -pthread -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all \
    -o decoder_fast/_native.so csrc/*.cpp

# Python itself is not sanitized, so the runtimes have to be loaded before it; and the C++ library,
# for them to find there the functions that they replace.
runtimes=$(for name in libasan libubsan libstdc++; do $cxx -print-file-name=$name.so; done)
LD_PRELOAD=$(echo $runtimes) \
ASAN_OPTIONS=detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824 \
UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" -m pytest -p no:cacheprovider --capture=sys "$@"
