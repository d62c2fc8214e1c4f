"""Sparse feed-forward layers: the op and its kernels, vLLM model classes, the offline ProSparse job, benchmarks."""
