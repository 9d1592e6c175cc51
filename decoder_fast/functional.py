"""The operations as functions, and count log-likelihoods for models that have their own means."""

from __future__ import annotations

from .ops.count_nll import count_nll
from .ops.covariate_linear import covariate_linear
from .ops.csr_linear import csr_linear
from .ops.log_prob import nb_log_prob, poisson_log_prob, zinb_log_prob
from .ops.softmax_library import softmax_library

__all__ = [
    "count_nll",
    "covariate_linear",
    "csr_linear",
    "nb_log_prob",
    "poisson_log_prob",
    "softmax_library",
    "zinb_log_prob",
]
