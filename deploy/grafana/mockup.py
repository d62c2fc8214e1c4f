"""Draw a dashboard from what a Prometheus has, for the documentation: Grafana's layout, queries and colours, drawn by matplotlib.

``python -m deploy.grafana.mockup prosparse-sparsity http://127.0.0.1:9090 docs/images/sparsity-board.png --minutes 6``
"""

import argparse
import json
import math
import re
import textwrap
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.grafana.__main__ import FOLDER
from deploy.grafana.panels import COLUMNS
from deploy.queries import without_variables

# Inches of a grid cell.
CELL = (0.72, 0.42)

PAGE, PANEL, TEXT, FAINT, GRID = "#111217", "#181b1f", "#ccccdc", "#8e8e99", "#2c3235"
COLOURS = {
    "green": "#73bf69",
    "orange": "#ff9830",
    "yellow": "#fade2a",
    "red": "#f2495c",
    "blue": "#5794f2",
    "super-light-blue": "#c0d8ff",
    "dark-purple": "#8f3bb8",
}
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#37872d", "#fade2a"]

Series = tuple[str, np.ndarray, np.ndarray]


class Source:
    """A Prometheus, and the minutes of it that are drawn."""

    def __init__(self, url: str, minutes: float) -> None:
        self._url = url
        self._end = time.time()
        self._seconds = 60 * minutes

    def series(self, target: dict[str, Any]) -> list[Series]:
        """Name, minutes before now and values of each series of a query, in the order of their names."""
        parameters = {
            "query": without_variables(target["expr"], rate="30s", time_range=f"{self._seconds:.0f}s"),
            "start": self._end - self._seconds,
            "end": self._end,
            "step": 5,
        }
        body = urllib.parse.urlencode(parameters).encode()
        with urllib.request.urlopen(f"{self._url}/api/v1/query_range", body) as answer:  # noqa: S310
            found = json.load(answer)["data"]["result"]
        series = []
        for entry in found:
            times, values = np.array(entry["values"], dtype=float).T
            keep = ~np.isnan(values)
            if keep.any():
                series.append(
                    (_name(target["legendFormat"], entry["metric"]), (times[keep] - self._end) / 60, values[keep])
                )
        return sorted(series, key=lambda item: _natural(item[0]))


def draw(board: dict[str, Any], source: Source) -> Figure:
    """The whole board."""
    mpl.rcParams.update(
        {
            "font.size": 8,
            "text.color": TEXT,
            "axes.edgecolor": GRID,
            "axes.labelcolor": FAINT,
            "font.family": "DejaVu Sans",
        }
        | {"xtick.color": FAINT, "ytick.color": FAINT, "axes.facecolor": PANEL, "axes.titlesize": 9}
    )
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = plt.figure(figsize=(COLUMNS * CELL[0], (height + 1) * CELL[1]), facecolor=PAGE)
    figure.text(0.008, 1 - 0.6 / (height + 1), board["title"], size=14, weight="bold", va="center")
    for panel in board["panels"]:
        place = panel["gridPos"]
        box = (
            place["x"] / COLUMNS,
            1 - (place["y"] + place["h"] + 1) / (height + 1),
            place["w"] / COLUMNS,
            place["h"] / (height + 1),
        )
        if panel["type"] == "row":
            figure.text(box[0] + 0.008, box[1] + box[3] / 2, panel["title"], size=10, weight="bold", va="center")
        else:
            _draw_panel(figure, box, panel, [(target, source.series(target)) for target in panel["targets"]])
    return figure


def _draw_panel(
    figure: Figure, box: tuple[float, float, float, float], panel: dict[str, Any], data: list[tuple[Any, list[Series]]]
) -> None:
    x, y, width, height = box
    pad_x, pad_y = 0.0022, 0.0022 * figure.get_figwidth() / figure.get_figheight()
    background = mpl.patches.Rectangle(
        (x + pad_x, y + pad_y), width - 2 * pad_x, height - 2 * pad_y, facecolor=PANEL, zorder=-1
    )
    figure.add_artist(background)
    line = CELL[1] / figure.get_figheight()
    figure.text(x + 4 * pad_x, y + height - pad_y - 0.45 * line, panel["title"], size=9, va="center")
    series = [item for _, found in data for item in found]
    if panel["type"] == "stat":
        _draw_number(figure, box, panel, series)
        return
    left = 0.62 if panel["type"] in ("bargauge", "heatmap") else 0.85
    bottom = {"timeseries": 1.95, "bargauge": 0.3}.get(panel["type"], 1.15)
    right = 1.2 if panel["type"] == "heatmap" else 0.7 if _on_the_right(panel) else 0.25
    inch = 1 / figure.get_figwidth()
    axes = figure.add_axes(
        (x + left * inch, y + bottom * line, width - (left + right) * inch, height - (bottom + 1.25) * line)
    )
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not series:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data", color=FAINT, ha="center", transform=axes.transAxes)
        return
    {"timeseries": _draw_lines, "heatmap": _draw_heat, "bargauge": _draw_bars, "xychart": _draw_scatter}[panel["type"]](
        axes, panel, data
    )


def _draw_number(figure: Figure, box: tuple[float, ...], panel: dict[str, Any], series: Sequence[Series]) -> None:
    x, y, width, height = box
    if panel["options"]["textMode"] == "name":
        text, colour = (series[0][0].strip() if series else "–"), COLOURS["blue"]
    elif series:
        value = float(series[0][2][-1])
        text = _formatter(panel["fieldConfig"]["defaults"]["unit"])(value)
        colour = _threshold_colour(panel, value)
    else:
        text, colour = panel["fieldConfig"]["defaults"].get("noValue", "–"), FAINT
    size = 17 if len(text) < 9 else 12
    figure.text(
        x + width / 2, y + 0.46 * height, text, size=size, weight="bold", color=colour, ha="center", va="center"
    )
    if series and panel["options"]["graphMode"] == "area":
        _, times, values = series[0]
        axes = figure.add_axes((x + 0.004, y + 0.05 * height, width - 0.008, 0.25 * height))
        axes.set_axis_off()
        axes.fill_between(times, values, color=colour, alpha=0.25, linewidth=0)
        axes.plot(times, values, color=colour, linewidth=0.8)
        axes.set_ylim(0, max(float(values.max()) * 1.1, 1e-9))


def _draw_lines(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    series = [item for _, found in data for item in found]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    other = axes.twinx() if _on_the_right(panel) else None
    base = np.zeros(1)
    for index, (name, times, values) in enumerate(series):
        properties = _properties(panel, name)
        colour = _colour(properties.get("color", {}).get("fixedColor", PALETTE[index % len(PALETTE)]))
        on = other if other is not None and properties.get("custom.axisPlacement") == "right" else axes
        dashed = "custom.lineStyle" in properties
        if stacked:
            # Series may begin at different times; a stack needs all at the same ones.
            everywhere = np.unique(np.concatenate([item[1] for item in series]))
            values, times = np.interp(everywhere, times, values, left=0, right=0), everywhere
            axes.fill_between(times, base, base + values, color=colour, alpha=0.4, linewidth=0)
            base = base + values
            values = base
        elif not dashed:
            on.fill_between(times, values, color=colour, alpha=0.08, linewidth=0)
        on.plot(times, values, color=colour, linewidth=1, linestyle="--" if dashed else "-")
        last = _formatter(properties.get("unit", defaults["unit"]))(float(series[index][2][-1]))
        axes.plot([], [], color=colour, label=f"{name}  {last}", linestyle="--" if dashed else "-")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _formatter(defaults["unit"])(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(0, defaults.get("max"))
    if other is not None:
        unit = next(
            properties["unit"]
            for name, _, _ in series
            if (properties := _properties(panel, name)).get("custom.axisPlacement") == "right"
        )
        other.set_ylim(0)
        other.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _formatter(unit)(value)))
        other.spines[:].set_visible(False)
        other.tick_params(length=0)
    _minutes(axes)
    legend = axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.13),
        ncols=3,
        frameon=False,
        fontsize=7,
        handlelength=1.2,
        columnspacing=1.2,
    )
    for text in legend.get_texts():
        text.set_color(TEXT)


def _draw_heat(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    ((target, series),) = data
    times = np.unique(np.concatenate([item[1] for item in series]))
    cells = np.full((len(series), len(times)), np.nan)
    for row, (_, at, values) in enumerate(series):
        cells[row, np.searchsorted(times, at)] = values
    names = [name for name, _, _ in series]
    if target["format"] == "heatmap":
        cells = np.diff(cells, axis=0, prepend=0)
    image = axes.pcolormesh(times, np.arange(len(names)), cells, cmap="viridis", vmin=0, shading="nearest")
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylabel(panel["options"]["yAxis"]["axisLabel"])
    axes.grid(visible=False)
    _minutes(axes)
    unit = panel["options"]["cellValues"]["unit"]
    bar = axes.figure.colorbar(
        image, ax=axes, fraction=0.03, pad=0.02, format=FuncFormatter(lambda value, _: _formatter(unit)(value))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _draw_bars(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    ((_, series),) = data
    defaults = panel["fieldConfig"]["defaults"]
    unit = _formatter(defaults["unit"])
    highest = defaults["max"]
    for row, (_, _, values) in enumerate(series):
        value = float(values[-1])
        colour = _threshold_colour(panel, value)
        axes.barh(row, highest, height=0.7, color=GRID)
        axes.barh(row, min(value, highest), height=0.7, color=colour, alpha=0.75)
        axes.text(highest, row, f" {unit(value)} ", color=TEXT, va="center", ha="right", size=8, weight="bold")
    axes.set_yticks(range(len(series)), [name for name, _, _ in series])
    axes.set_xlim(0, highest)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.grid(visible=False)


def _draw_scatter(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    (x_name, x_times, x_values), (y_name, y_times, y_values) = (found[0] for _, found in data)
    _, of_x, of_y = np.intersect1d(np.round(x_times, 4), np.round(y_times, 4), return_indices=True)
    axes.scatter(x_values[of_x], y_values[of_y], s=10, color=COLOURS["blue"], alpha=0.8, linewidth=0)
    for name, axis, limit in ((x_name, axes.xaxis, axes.set_xlim), (y_name, axes.yaxis, axes.set_ylim)):
        properties = _properties(panel, name)
        axis.set_major_formatter(FuncFormatter(lambda value, _, unit=properties["unit"]: _formatter(unit)(value)))
        axis.set_label_text(name)
        limit(0, properties.get("max"))


def _name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def _minutes(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "now" if value == 0 else f"{value:g} min"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0)


def _formatter(unit: str) -> Callable[[float], str]:
    """Numbers as Grafana writes them in a unit."""
    if unit == "percentunit":
        return lambda value: f"{100 * value:.3g} %"
    if unit == "s":
        return lambda value: f"{value:.3g} s" if value >= 1 or value == 0 else f"{1000 * value:.3g} ms"
    suffix = {"Bps": "B/s", "bytes": "B", "reqps": "req/s"}.get(unit, unit.removeprefix("suffix:").strip())
    suffix = "" if unit in ("none", "short") else f" {suffix}"
    return lambda value: _short(value) + suffix


def _short(value: float) -> str:
    for scale, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


def _threshold_colour(panel: dict[str, Any], value: float) -> str:
    colour = "blue"
    for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return _colour(colour)


def _properties(panel: dict[str, Any], name: str) -> dict[str, Any]:
    """What the panel overrides for the series of this name."""
    return {
        entry["id"]: entry["value"]
        for override in panel["fieldConfig"]["overrides"]
        if re.fullmatch(override["matcher"]["options"].strip("/^$"), name)
        for entry in override["properties"]
    }


def _on_the_right(panel: dict[str, Any]) -> bool:
    return any(
        entry == {"id": "custom.axisPlacement", "value": "right"}
        for override in panel["fieldConfig"]["overrides"]
        for entry in override["properties"]
    )


def _colour(name: str) -> str:
    return COLOURS.get(name, name)


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key under which "10" comes after "9"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if part[:1].isdigit() else (1, math.inf, part) for part in parts if part]


def main() -> None:
    """Draw one board."""
    parser = argparse.ArgumentParser(description=textwrap.shorten(str(__doc__), 120))
    parser.add_argument("board", choices=["prosparse-service", "prosparse-sparsity"], help="uid of the board")
    parser.add_argument("prometheus", help="address of a Prometheus")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="time range, up to now (default: 60)")
    arguments = parser.parse_args()
    board = json.loads((FOLDER / f"{arguments.board}.json").read_text())
    figure = draw(board, Source(arguments.prometheus, arguments.minutes))
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=100, facecolor=PAGE)


if __name__ == "__main__":
    main()
