"""Benchmarks, installed as ``decoder_fast.bench``.

``decoder-fast bench`` is what users run (:mod:`.suite`); ``python -m bench`` and ``python -m
bench.gpu`` have the details.
"""
