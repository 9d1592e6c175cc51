"""One file an operation: what calls its native CPU kernel in ``csrc``."""
