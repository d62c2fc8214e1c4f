"""The gated feed-forward layer that computes active neurons only: op, reference, path choice, counters, kernels."""

from sparse_backend.ffn.op import gated_activation, sparse_gated_ffn

__all__ = ["gated_activation", "sparse_gated_ffn"]
