"""Triton kernels and their launchers, one file an operation; imports torch and triton only.

Installed as ``decoder_fast.triton_kernels``: Triton itself ships a top-level package of this name.
"""

#: Names of the operations that have a Triton kernel in this version.
OPERATIONS: frozenset[str] = frozenset({"covariate_linear", "softmax_library", "count_nll"})
