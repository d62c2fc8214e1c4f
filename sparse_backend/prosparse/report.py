"""What a person reads after a run: ``report.md`` with its plots, and the figures behind them under ``report/``."""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_backend.checkpoint import Manifest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_NAME = "report.md"
FOLDER_NAME = "report"

Table = Sequence[Sequence[str]]
History = Sequence[Mapping[str, float]]


def write_report(
    folder: Path, manifest: Manifest, histories: Mapping[str, History], sweep: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``report.md`` into a finished checkpoint's folder, and its plots and figures into ``report/`` beside it.

    Without matplotlib the plots are left out and the report says how to get them.

    Args:
        folder: the checkpoint's folder.
        manifest: its manifest.
        histories: by training phase, the Trainer's log entries in the order of the steps.
        sweep: the threshold sweep's points, as in the manifest.
    """
    figures = folder / FOLDER_NAME
    figures.mkdir(exist_ok=True)
    for phase, history in histories.items():
        write_history(figures / f"{phase}.jsonl", history)
    plots = _draw(figures, manifest, histories, sweep)
    (folder / REPORT_NAME).write_text("\n\n".join(_sections(manifest, sweep, plots)) + "\n")


def write_history(path: Path, history: History) -> None:
    """Write log entries as JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in history))


def markdown_table(header: Sequence[str], rows: Table) -> str:
    """A Markdown table whose first column is left-aligned and whose others are right-aligned."""
    lines = [header, ["--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plotting_is_possible() -> bool:
    """True where matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_histories(
    axes: "Axes", histories: Mapping[str, History], field: str, label: str, colours: Mapping[str, Any] | None = None
) -> None:
    """One line per history: ``field`` over the steps.

    ``colours`` are the lines' by name, where a legend outside of the axes explains them; without, the axes have their own.
    """
    for name, history in histories.items():
        points = [(entry["step"], entry[field]) for entry in history if field in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, color=colours and colours[name])
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if colours is None and len(axes.lines) > 1:
        axes.legend()


def _sections(manifest: Manifest, sweep: Sequence[Mapping[str, Any]], plots: Mapping[str, str]) -> list[str]:
    held_out = manifest.held_out
    rise = held_out.loss / held_out.base_loss - 1
    sections = [
        "# How this checkpoint was made",
        f"{manifest.activation}: **{held_out.sparsity:.2%} sparse** (exact zeros in relu(gate)·up, mean over layers) at a"
        f" held-out loss of {held_out.loss:.4f} nats a token; the model it was made from has {held_out.base_loss:.4f}"
        f" ({rise:+.2%}).",
        f"```sh\n{manifest.command}\n```",
        f"Corpus {manifest.corpus.name}, {manifest.corpus.train_tokens:,} training tokens; measured on"
        f" {held_out.tokens:,} tokens of {manifest.corpus.held_out_documents} documents that nothing was trained on."
        f" {manifest.device}, seed {manifest.seed}.",
        "## Phases",
        markdown_table(
            ("phase", "steps", "tokens", "seconds"),
            [
                (phase.name, f"{phase.steps:,}", f"{phase.tokens:,}", f"{phase.seconds:,.1f}")
                for phase in manifest.phases
            ],
        ),
    ]
    if manifest.domains:
        sections += [
            "## Domains, on held-out text",
            markdown_table(
                ("domain", "tokens", "loss", "loss of the base", "sparsity"),
                [
                    (
                        domain.name,
                        f"{domain.tokens:,}",
                        f"{domain.loss:.4f}",
                        f"{domain.base_loss:.4f}",
                        f"{domain.sparsity:.2%}",
                    )
                    for domain in manifest.domains
                ],
            ),
        ]
    sections += [
        "## Training",
        _plot(plots, "training", "loss, λ and sparsity over the steps"),
        "## Layers",
        markdown_table(
            ("layer", "sparsity"), [(str(layer.layer), f"{layer.sparsity:.2%}") for layer in manifest.layers]
        ),
        _plot(plots, "layers", "sparsity per layer"),
        _plot(plots, "neurons", "how often neurons are active"),
        "## Activation threshold",
        markdown_table(
            ("threshold", "held-out loss", "sparsity", ""),
            [
                (
                    f"{point['threshold']:g}{' × per layer' if 'factors' in point else ''}",
                    f"{point['loss']:.4f}",
                    f"{point['sparsity']:.2%}",
                    "chosen" if point.get("chosen") else "",
                )
                for point in sweep
            ],
        ),
        _plot(plots, "threshold", "the threshold sweep"),
    ]
    if not plots:
        sections.append("matplotlib was not installed, so there are no plots: `pip install 'prosparse-serve[train]'`.")
    return [section for section in sections if section]


def _plot(plots: Mapping[str, str], name: str, caption: str) -> str:
    return f"![{caption}]({plots[name]})" if name in plots else ""


def _draw(
    folder: Path, manifest: Manifest, histories: Mapping[str, History], sweep: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Draw every plot; returns each one's path relative to the report, by name. Empty without matplotlib."""
    if not plotting_is_possible():
        return {}
    from matplotlib.figure import Figure

    figures = {}

    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, field, label in zip(
        axes, ("loss", "lambda", "sparsity"), ("loss (nats a token)", "λ", "sparsity"), strict=True
    ):
        draw_histories(axis, histories, field, label)
    draw_histories(axes[0], {f"{name}, held out": history for name, history in histories.items()}, "eval_loss", "loss")
    figures["training"] = figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    axis.bar([layer.layer for layer in manifest.layers], [layer.sparsity for layer in manifest.layers])
    axis.set(xlabel="layer", ylabel="sparsity", ylim=(0, 1))
    figures["layers"] = figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for layer in manifest.layers:
        # Neurons in the order of how often they are active: how far the layer is from a few always-on neurons.
        axis.plot(sorted(layer.neuron_frequency, reverse=True), color=f"{0.8 * layer.layer / len(manifest.layers):.2f}")
    axis.set(xlabel="neuron, most active first (dark: first layer)", ylabel="share of tokens", ylim=(0, 1))
    axis.set_yscale("symlog", linthresh=1e-3)
    figures["neurons"] = figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for own, label in ((False, "one for all layers"), (True, "per layer")):
        points = [point for point in sweep if ("factors" in point) is own]
        if points:
            axis.plot([p["sparsity"] for p in points], [p["loss"] for p in points], marker="o", label=label)
    for point in sweep:
        if point.get("chosen"):
            axis.plot(point["sparsity"], point["loss"], marker="*", markersize=16, color="black", label="chosen")
    axis.set(xlabel="sparsity", ylabel="held-out loss (nats a token)")
    axis.legend()
    figures["threshold"] = figure

    for name, drawn in figures.items():
        drawn.savefig(folder / f"{name}.png", dpi=120)
    return {name: f"{FOLDER_NAME}/{name}.png" for name in figures}
