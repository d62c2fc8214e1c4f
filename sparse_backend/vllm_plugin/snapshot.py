"""The record of live sparsity that crosses from the vLLM worker to the server process. Imports neither torch nor vLLM."""

from typing import Literal, TypedDict

Path = Literal["sparse", "dense"]
PATHS: tuple[Path, Path] = ("sparse", "dense")


class PathCounts(TypedDict):
    """Cumulative counts of one layer on one path since the engine became ready."""

    rows: int
    """Token rows the layer computed."""
    active: int
    """Active neurons, summed over rows."""
    union: int
    """Neurons active for at least one row of a step, summed over steps."""
    steps: int
    """Engine steps (calls of the layer with at least one row)."""


class LayerSnapshot(TypedDict):
    """One feed-forward layer; with tensor parallelism, its share on all ranks together."""

    layer: str
    """Index of the layer in the model, as text ("0", "1", …)."""
    d_ff: int
    """Neurons of the layer."""
    neuron_bytes: int
    """Bytes of one neuron's row in one of the matrices gate, up and down: d_model elements of the engine's dtype."""
    max_sparse_rows: int
    """Steps of at most this many rows take the sparse path."""
    dense_reason: str
    """Why the layer is computed densely by vLLM's own linear layers: "lora" or "quantization"; "" where it is not."""
    paths: dict[Path, PathCounts]


class KernelRecord(TypedDict):
    """Which implementation computes the feed-forward layers."""

    name: str
    """"cpu", "cuda" or "reference"."""
    isa: str
    """Instruction set in use, for example "avx512_bf16" or "sm_90"; "" for the reference."""
    reason: str
    """Why every layer takes the dense path: the reference is in use, or the kernels do not know the dtype; "" otherwise."""


class SparsitySnapshot(TypedDict):
    """What ``collective_rpc("sparsity_snapshot")`` returns, one per worker."""

    kernel: KernelRecord
    layers: list[LayerSnapshot]


def merge(snapshots: list[SparsitySnapshot]) -> SparsitySnapshot:
    """Join the workers' snapshots into one of the whole model.

    Tensor-parallel ranks hold different neurons of the same layer and see the same rows: neurons, active and union counts add
    up, rows and steps do not. Pipeline ranks hold different layers, which are put side by side.

    Raises:
        ValueError: ``snapshots`` is empty.
    """
    if not snapshots:
        raise ValueError("no worker returned a sparsity snapshot")
    merged: dict[str, LayerSnapshot] = {}
    for snapshot in snapshots:
        for layer in snapshot["layers"]:
            whole = merged.get(layer["layer"])
            if whole is None:
                merged[layer["layer"]] = {
                    **layer,
                    "paths": {path: {**counts} for path, counts in layer["paths"].items()},
                }
                continue
            whole["d_ff"] += layer["d_ff"]
            for path, counts in layer["paths"].items():
                whole["paths"][path]["active"] += counts["active"]
                whole["paths"][path]["union"] += counts["union"]
    return {"kernel": snapshots[0]["kernel"], "layers": sorted(merged.values(), key=lambda layer: int(layer["layer"]))}
