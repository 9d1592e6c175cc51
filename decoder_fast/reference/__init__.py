"""The plain-PyTorch meaning of every operation: fallback everywhere, and truth for the tests."""
