"""Benchmarks against PyTorch: ``python -m benchmarks --help``."""
