"""Benchmarks anyone can run: `prosparse bench …`."""
