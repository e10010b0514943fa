"""Benchmarks on a card, ours against its peers; each file's docstring says what it measures and how to run it."""
