"""How each kind of panel is drawn, as Grafana draws it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
"""Name, minutes before now, values."""


def number(figure: Figure, box: tuple[float, ...], panel: dict[str, Any], series: Sequence[Series]) -> None:
    """A figure or a text, and the course behind it; ``box`` is the panel's place in the figure: x, y, width, height."""
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


def lines(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    """Courses over time, with a legend that has the newest values."""
    defaults = panel["fieldConfig"]["defaults"]
    series = [item for _, found in data for item in found]
    stacked = defaults["custom"]["stacking"]["mode"] == "normal"
    other = axes.twinx() if has_right_axis(panel) else None
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


def heat(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    """A row of cells for each series, or for each bucket of a histogram."""
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


def bars(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    """A bar for each series."""
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


def scatter(axes: Axes, panel: dict[str, Any], data: list[tuple[Any, list[Series]]]) -> None:
    """A point for each moment that both queries have."""
    (x_name, x_times, x_values), (y_name, y_times, y_values) = (found[0] for _, found in data)
    _, of_x, of_y = np.intersect1d(np.round(x_times, 4), np.round(y_times, 4), return_indices=True)
    axes.scatter(x_values[of_x], y_values[of_y], s=10, color=COLOURS["blue"], alpha=0.8, linewidth=0)
    for name, axis, limit in ((x_name, axes.xaxis, axes.set_xlim), (y_name, axes.yaxis, axes.set_ylim)):
        properties = _properties(panel, name)
        axis.set_major_formatter(FuncFormatter(lambda value, _, unit=properties["unit"]: _formatter(unit)(value)))
        axis.set_label_text(name)
        limit(0, properties.get("max"))


def _minutes(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: "now" if value == 0 else f"{value:g} min"))
    axes.xaxis.set_major_locator(MaxNLocator(4))
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


def has_right_axis(panel: dict[str, Any]) -> bool:
    """Whether some series belong to an axis on the right."""
    return any(
        entry == {"id": "custom.axisPlacement", "value": "right"}
        for override in panel["fieldConfig"]["overrides"]
        for entry in override["properties"]
    )


def _colour(name: str) -> str:
    return COLOURS.get(name, name)
