"""``prosparse inspect``: what a checkpoint folder says of itself."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from sparse_backend.checkpoint import MANIFEST_NAME, Checkpoint, LayerRecord

# A neuron this rarely active adds next to nothing; one this often active is hardly ever skipped.
_RARE, _FREQUENT = 0.001, 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="measure held-out loss and sparsity again, on the CPU; status 1 if they are not the manifest's",
    )
    parser.add_argument(
        "--corpus",
        metavar="SOURCE",
        help="with --verify, the corpus the checkpoint was made with, where its folder does not hold the held-out text"
        " (default: stdlib)",
    )


def run(args: argparse.Namespace) -> int:
    """Check the folder as the server would, hashes included, and print what it says of itself.

    Raises:
        UserError: the server would refuse the folder.
    """
    checkpoint = Checkpoint.open(args.folder)
    if args.verify:
        return _verify(checkpoint, args)
    summary = summarise(checkpoint)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        # A pipe has no width; this one keeps a file name and its hash in one line. What a folder says of itself is
        # printed as it is: brackets and colons in it are no markup.
        width = None if sys.stdout.isatty() else 100
        _print(summary, Console(highlight=False, markup=False, emoji=False, width=width))
    return 0


def _verify(checkpoint: Checkpoint, args: argparse.Namespace) -> int:
    # Imported here: it takes torch and transformers, which a look at the manifest does not.
    from sparse_backend.prosparse.verify import verify

    found = verify(checkpoint, args.corpus)
    if args.json:
        print(json.dumps(asdict(found) | {"agrees": found.agrees}, indent=2))
    else:
        print(f"held-out loss  {found.loss:.4f} measured, {found.recorded_loss:.4f} in the manifest")
        print(f"sparsity       {found.sparsity:.2%} measured, {found.recorded_sparsity:.2%} in the manifest")
        print("They agree." if found.agrees else "They differ by more than rounding explains.")
    return 0 if found.agrees else 1


def summarise(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's shape and activation, and its origin under ``manifest`` (None for a folder without one)."""
    config, manifest = checkpoint.config, checkpoint.manifest
    summary: dict[str, Any] = {
        "folder": str(checkpoint.folder),
        "architecture": config["architectures"][0],
        "model_type": config.get("model_type"),
        "activation": checkpoint.activation.kind,
        "threshold": checkpoint.activation.threshold,
        "layers": checkpoint.n_layers,
        "d_model": config["hidden_size"],
        "d_ff": config["intermediate_size"],
        "vocabulary": config.get("vocab_size"),
        "context_length": checkpoint.context_length,
        "weights_bytes": sum(shard.stat().st_size for shard in checkpoint.shards),
        "manifest": None,
    }
    if manifest is not None:
        summary["manifest"] = manifest.model_dump(mode="json", exclude={"layers"}) | {
            "layers": [_summarise_layer(layer) for layer in manifest.layers]
        }
    return summary


def _summarise_layer(layer: LayerRecord) -> dict[str, Any]:
    frequency = layer.neuron_frequency
    return {
        "layer": layer.layer,
        "sparsity": layer.sparsity,
        "rare_neurons": sum(share < _RARE for share in frequency),
        "frequent_neurons": sum(share > _FREQUENT for share in frequency),
        "highest_frequency": max(frequency, default=0.0),
    }


def _print(summary: dict[str, Any], console: Console) -> None:
    manifest = summary["manifest"]
    facts = _facts()
    activation = "ReLU" if summary["activation"] == "relu" else f"FATReLU, threshold {summary['threshold']:g}"
    facts.add_row("folder", summary["folder"])
    facts.add_row("architecture", f"{summary['architecture']} ({summary['model_type']})")
    facts.add_row("activation", activation)
    facts.add_row("shape", f"{summary['layers']} layers, d_model {summary['d_model']}, d_ff {summary['d_ff']}")
    facts.add_row("vocabulary", f"{summary['vocabulary']} tokens")
    facts.add_row("context", f"{summary['context_length']} tokens")
    facts.add_row("weights", f"{summary['weights_bytes'] / 2**20:.1f} MiB")
    if manifest is None:
        console.print(facts)
        console.print(
            f"No {MANIFEST_NAME}: this folder was not made by `prosparse sparsify`; its sparsity, origin and hashes are"
            " not on record.",
            soft_wrap=True,
        )
        return
    held_out, corpus = manifest["held_out"], manifest["corpus"]
    facts.add_row("sparsity", f"{held_out['sparsity']:.2%} on held-out text, mean over layers")
    facts.add_row("held-out loss", f"{held_out['loss']:.4f} nats a token (base {held_out['base_loss']:.4f})")
    facts.add_row("held-out text", f"{held_out['tokens']:,} tokens of {corpus['held_out_documents']} documents")
    facts.add_row("corpus", f"{corpus['name']}, {corpus['documents']} documents, {corpus['train_tokens']:,} tokens")
    facts.add_row("corpus SHA-256", corpus["sha256"])
    facts.add_row("made from", f"a model with hidden_act {manifest['base_activation']!r}")
    facts.add_row("made by", manifest["command"])
    facts.add_row("made on", f"{manifest['device']}, seed {manifest['seed']}")
    facts.add_row("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()))
    console.print(facts)
    console.print("\nLayers, on held-out text", style="italic")
    console.print(_layer_table(manifest["layers"]))
    for phase in manifest["phases"]:
        steps = f"{phase['steps']:,} steps, {phase['tokens']:,} tokens, " if phase["steps"] else ""
        console.print(f"\nPhase: {phase['name']}, {steps}{phase['seconds']:.1f} s", style="italic")
        console.print(_settings_table(phase["settings"]))
    hashes = _facts()
    for name, digest in manifest["files"].items():
        hashes.add_row(name, digest)
    console.print("\nFiles and their SHA-256, just checked", style="italic")
    console.print(hashes)


def _facts() -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    table = Table()
    for name in ("layer", "sparsity", f"neurons active < {_RARE:.1%}", f"neurons active > {_FREQUENT:.0%}", "highest"):
        table.add_column(name, justify="right")
    for layer in layers:
        table.add_row(
            str(layer["layer"]),
            f"{layer['sparsity']:.2%}",
            str(layer["rare_neurons"]),
            str(layer["frequent_neurons"]),
            f"{layer['highest_frequency']:.1%}",
        )
    return table


def _settings_table(settings: dict[str, Any]) -> Table:
    table = _facts()
    for name, value in settings.items():
        table.add_row(name, _describe(value))
    return table


def _describe(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(_describe(entry) for entry in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_describe(entry)}" for name, entry in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
