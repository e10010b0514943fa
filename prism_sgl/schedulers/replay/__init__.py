"""Replay of a trace on a model of the machine: devices, engines with batches, policies. Pure, deterministic."""
