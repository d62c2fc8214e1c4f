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
    merged = _by_layer(snapshots)
    for whole, shares in merged.values():
        for share in shares:
            whole["d_ff"] += share["d_ff"]
            _add(whole, share, ("active", "union"))
    return _joined(snapshots, merged)


def add_up(replicas: list[SparsitySnapshot]) -> SparsitySnapshot:
    """Join the snapshots of data-parallel replicas, each of a whole model of its own: all counts add up.

    Raises:
        ValueError: ``replicas`` is empty.
    """
    merged = _by_layer(replicas)
    for whole, others in merged.values():
        for other in others:
            _add(whole, other, ("rows", "active", "union", "steps"))
    return _joined(replicas, merged)


_Merged = dict[str, tuple[LayerSnapshot, list[LayerSnapshot]]]
_Kind = Literal["rows", "active", "union", "steps"]


def _by_layer(snapshots: list[SparsitySnapshot]) -> _Merged:
    """Per layer, a copy of what the first snapshot that has it says, and what the others say."""
    merged: _Merged = {}
    for snapshot in snapshots:
        for layer in snapshot["layers"]:
            if layer["layer"] in merged:
                merged[layer["layer"]][1].append(layer)
            else:
                paths: dict[Path, PathCounts] = {path: {**counts} for path, counts in layer["paths"].items()}
                merged[layer["layer"]] = ({**layer, "paths": paths}, [])
    return merged


def _add(whole: LayerSnapshot, other: LayerSnapshot, kinds: tuple[_Kind, ...]) -> None:
    for path, counts in other["paths"].items():
        for kind in kinds:
            whole["paths"][path][kind] += counts[kind]


def _joined(snapshots: list[SparsitySnapshot], merged: _Merged) -> SparsitySnapshot:
    if not snapshots:
        raise ValueError("no worker returned a sparsity snapshot")
    layers = sorted((whole for whole, _ in merged.values()), key=lambda layer: int(layer["layer"]))
    return {"kernel": snapshots[0]["kernel"], "layers": layers}
