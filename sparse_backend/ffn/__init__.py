"""The gated feed-forward layer that computes active neurons only: op, reference, path choice, counters, kernels."""

from sparse_backend.ffn.op import sparse_gated_ffn

__all__ = ["sparse_gated_ffn"]
