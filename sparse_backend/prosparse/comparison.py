"""The controls side by side: the paper's table for them, how they got there, and what sparsity costs each of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_backend.prosparse.report import draw_histories, markdown_table, plotting_is_possible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITH_THRESHOLD = ", with threshold"
"""What the name of a run's second row ends with."""

Row = Mapping[str, Any]
"""One row of the table, as ``train_controls`` returns it."""


def tables(rows: Sequence[Row], dense: str) -> list[str]:
    """Loss, perplexity and sparsity of every row, then by domain, then by layer, in Markdown.

    Args:
        rows: at least one.
        dense: name of the row that losses are compared with; it may be absent.
    """
    domains, layers = list(rows[0]["domains"]), len(rows[0]["layers"])
    reference = next((row["loss"] for row in rows if row["name"] == dense), math.nan)
    whole = [
        [
            row["name"],
            f"{row['loss']:.4f}",
            "" if math.isnan(reference) else f"{row['loss'] / reference - 1:+.2%}",
            f"{math.exp(row['loss']):.2f}",
            f"{row['sparsity']:.2%}",
        ]
        for row in rows
    ]
    by_domain = [
        [
            row["name"],
            *(
                f"{part['loss']:.4f} · {math.exp(part['loss']):.2f} · {part['sparsity']:.2%}"
                for part in row["domains"].values()
            ),
        ]
        for row in rows
    ]
    by_layer = [[row["name"], *(f"{share:.1%}" for share in row["layers"])] for row in rows]
    return [
        markdown_table(("run", "held-out loss", "above dense", "perplexity", "sparsity"), whole),
        "Held-out loss · perplexity · sparsity by domain:",
        markdown_table(("run", *domains), by_domain),
        "Sparsity by layer:",
        markdown_table(("run", *map(str, range(layers))), by_layer),
    ]


def draw(folder: Path, rows: Sequence[Row], dense: str) -> str:
    """Write ``controls.png`` and ``sweeps.png``; returns the Markdown that shows them, empty without matplotlib."""
    if not plotting_is_possible():
        return ""
    from matplotlib import colormaps

    histories = {row["name"]: row["history"] for row in rows if "history" in row}
    palette = colormaps["tab20"]
    colours = {name: palette(index % palette.N) for index, name in enumerate(histories)}
    plots = {
        "controls": (_histories(histories, colours), "loss, λ and sparsity over the steps"),
        "sweeps": (_sweeps(rows, dense, colours), "loss against sparsity: each run's thresholds"),
    }
    for name, (figure, _) in plots.items():
        figure.savefig(folder / f"{name}.png", dpi=100)
    return "".join(f"\n![{caption}]({name}.png)\n" for name, (_, caption) in plots.items())


def _histories(histories: Mapping[str, Sequence[Mapping[str, float]]], colours: Mapping[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, field, label in zip(
        axes, ("eval_loss", "lambda", "sparsity"), ("held-out loss (nats a token)", "λ", "sparsity"), strict=True
    ):
        draw_histories(axis, histories, field, label, colours)
    figure.legend(handles=axes[0].lines, loc="outside right upper")
    return figure


def _sweeps(rows: Sequence[Row], dense: str, colours: Mapping[str, Any]) -> "Figure":
    """A run's line joins its thresholds, one without any is a point; the dense model's loss is a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    swept = {row["name"].removesuffix(WITH_THRESHOLD): row["sweep"] for row in rows if "sweep" in row}
    for row in rows:
        name = row["name"]
        if name == dense:
            axis.axhline(row["loss"], label=name, color=colours[name])
        elif name in colours:
            points = [point for point in swept.get(name, [row]) if not point.get("factors")]
            at, losses = ([point[field] for point in points] for field in ("sparsity", "loss"))
            axis.plot(at, losses, marker=".", label=name, color=colours[name])
    axis.set(xlabel="sparsity", ylabel="held-out loss (nats a token)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure
