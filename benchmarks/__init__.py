"""Measurements: each file is a program of its own and writes its numbers to ``results/``."""
