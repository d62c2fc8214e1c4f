"""Draw a dashboard from what a Prometheus has, for the documentation: Grafana's layout, queries and colours, drawn by matplotlib.

``python -m deploy.grafana.mockup prosparse-sparsity http://127.0.0.1:9090 docs/images/sparsity-board.png --minutes 6``
"""

import argparse
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from deploy.grafana import strokes
from deploy.grafana.__main__ import FOLDER
from deploy.grafana.panels import COLUMNS
from deploy.metrics.queries import without_variables

# Inches of a grid cell.
CELL = (0.72, 0.42)

_STYLE = {
    "font.size": 8,
    "text.color": strokes.TEXT,
    "axes.edgecolor": strokes.GRID,
    "axes.labelcolor": strokes.FAINT,
    "axes.facecolor": strokes.PANEL,
    "xtick.color": strokes.FAINT,
    "ytick.color": strokes.FAINT,
}

_STROKES = {"timeseries": strokes.lines, "heatmap": strokes.heat, "bargauge": strokes.bars, "xychart": strokes.scatter}


class Source:
    """A Prometheus, and the minutes of it that are drawn."""

    def __init__(self, url: str, minutes: float) -> None:
        self._url = url
        self._end = time.time()
        self._seconds = 60 * minutes

    def series(self, target: dict[str, Any]) -> list[strokes.Series]:
        """Name, minutes before now and values of each series of a query, in the order of their names."""
        parameters = {
            "query": without_variables(target["expr"], rate="30s", time_range=f"{self._seconds:.0f}s"),
            "start": self._end - self._seconds,
            "end": self._end,
            "step": 5,
        }
        answer = httpx.post(f"{self._url}/api/v1/query_range", data=parameters).raise_for_status()
        series = []
        for entry in answer.json()["data"]["result"]:
            times, values = np.array(entry["values"], dtype=float).T
            keep = ~np.isnan(values)
            if keep.any():
                series.append(
                    (_name(target["legendFormat"], entry["metric"]), (times[keep] - self._end) / 60, values[keep])
                )
        return sorted(series, key=lambda item: _natural(item[0]))


@mpl.rc_context(_STYLE)
def draw(board: dict[str, Any], source: Source) -> Figure:
    """The whole board."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure(figsize=(COLUMNS * CELL[0], (height + 1) * CELL[1]), facecolor=strokes.PAGE)
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
    figure: Figure,
    box: tuple[float, float, float, float],
    panel: dict[str, Any],
    data: list[tuple[Any, list[strokes.Series]]],
) -> None:
    x, y, width, height = box
    pad_x, pad_y = 0.0022, 0.0022 * figure.get_figwidth() / figure.get_figheight()
    background = mpl.patches.Rectangle(
        (x + pad_x, y + pad_y), width - 2 * pad_x, height - 2 * pad_y, facecolor=strokes.PANEL, zorder=-1
    )
    figure.add_artist(background)
    line = CELL[1] / figure.get_figheight()
    figure.text(x + 4 * pad_x, y + height - pad_y - 0.45 * line, panel["title"], size=9, va="center")
    series = [item for _, found in data for item in found]
    if panel["type"] == "stat":
        strokes.number(figure, box, panel, series)
        return
    left = 0.62 if panel["type"] in ("bargauge", "heatmap") else 0.85
    bottom = {"timeseries": 1.95, "bargauge": 0.3}.get(panel["type"], 1.15)
    right = 1.2 if panel["type"] == "heatmap" else 0.7 if strokes.has_right_axis(panel) else 0.25
    inch = 1 / figure.get_figwidth()
    axes = figure.add_axes(
        (x + left * inch, y + bottom * line, width - (left + right) * inch, height - (bottom + 1.25) * line)
    )
    axes.grid(color=strokes.GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if not series:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no data", color=strokes.FAINT, ha="center", transform=axes.transAxes)
        return
    _STROKES[panel["type"]](axes, panel, data)


def _name(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), legend)


def _natural(text: str) -> list[tuple[int, float, str]]:
    """A sort key under which "10" comes after "9"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(0, float(part), "") if part[:1].isdigit() else (1, math.inf, part) for part in parts if part]


def main() -> None:
    """Draw one board."""
    parser = argparse.ArgumentParser(description="Draw a dashboard from what a Prometheus has.")
    parser.add_argument("board", choices=["prosparse-service", "prosparse-sparsity"], help="uid of the board")
    parser.add_argument("prometheus", help="address of a Prometheus")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--minutes", type=float, default=60.0, help="time range, up to now (default: 60)")
    arguments = parser.parse_args()
    board = json.loads((FOLDER / f"{arguments.board}.json").read_text())
    figure = draw(board, Source(arguments.prometheus, arguments.minutes))
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.picture, dpi=100, facecolor=strokes.PAGE)


if __name__ == "__main__":
    main()
