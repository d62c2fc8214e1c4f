"""The kinds of panel that the boards are made of, all of one look. Types are Grafana's own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from grafana_foundation_sdk.models import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
    xychart,
)

# The grid's.
COLUMNS = 24

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

GOOD, WARN, BAD, NEUTRAL, FAINT = "green", "orange", "red", "blue", "#8e8e8e"
PATH_COLOURS = {"sparse": "green", "dense": "orange"}
QUANTILE_COLOURS = {"p50": "super-light-blue", "p95": "blue", "p99": "dark-purple"}
STATUS_COLOURS = {"2..": "green", "4..": "yellow", "5..": "red"}


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel; ``instant`` asks for its newest value only."""

    expr: str
    legend: str = ""
    instant: bool = False


@dataclass(frozen=True)
class Tile:
    """A panel and the room it takes on the grid."""

    panel: dashboard.Panel
    width: int
    height: int


@dataclass(frozen=True)
class Steps:
    """Colours of a value: the first from minus infinity, each other from its threshold on."""

    first: str
    then: Sequence[tuple[float, str]] = ()

    def config(self) -> dashboard.ThresholdsConfig:
        """As Grafana writes it."""
        steps = [dashboard.Threshold(color=self.first)]
        steps += [dashboard.Threshold(value=value, color=colour) for value, colour in self.then]
        return dashboard.ThresholdsConfig(mode=dashboard.ThresholdsMode.ABSOLUTE, steps=steps)


PLAIN = Steps(NEUTRAL)


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    steps: Steps = PLAIN,
    words: dict[str, str] | None = None,
    no_value: str = "–",
    width: int = 3,
) -> Tile:
    """One figure with its recent course behind it; ``words`` replaces values by text."""
    options = stat.Options(
        graph_mode=common.BigValueGraphMode.NONE if query.instant else common.BigValueGraphMode.AREA,
        color_mode=common.BigValueColorMode.VALUE,
        justify_mode=common.BigValueJustifyMode.AUTO,
        text_mode=common.BigValueTextMode.VALUE,
        reduce_options=common.ReduceDataOptions(calcs=["lastNotNull"]),
        orientation=common.VizOrientation.AUTO,
    )
    defaults = dashboard.FieldConfig(unit=unit, thresholds=steps.config(), no_value=no_value)
    if words:
        results = {value: dashboard.ValueMappingResult(text=text) for value, text in words.items()}
        defaults.mappings = [dashboard.ValueMap(options=results)]
    return _tile("stat", title, description, [query], options, defaults, width=width, height=4)


def label(title: str, description: str, query: Query, *, width: int = 3) -> Tile:
    """The text in a label: the query's legend names it."""
    tile = number(title, description, replace(query, instant=True), unit="none", width=width)
    tile.panel.options.text_mode = common.BigValueTextMode.NAME  # type: ignore[attr-defined]
    return tile


def lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    *,
    unit: str,
    colours: dict[str, str] | None = None,
    stacked: bool = False,
    dashed: str | None = None,
    right: tuple[str, str] | None = None,
    limit: float | None = None,
    highest: float | None = None,
    width: int = 8,
) -> Tile:
    """Courses over time.

    Args:
        title: of the panel.
        description: what is shown, of what it is made, and what to do about it.
        queries: each may give several series.
        unit: Grafana's name of the unit.
        colours: by legend, a regular expression; other series take the palette's.
        stacked: areas on top of each other.
        dashed: legend of the series that are drawn dashed in grey: limits and expectations.
        right: legend and unit of the series that belong to an axis on the right.
        limit: where an objective is drawn.
        highest: upper end of the axis.
        width: grid columns.
    """
    custom = timeseries.FieldConfig(
        draw_style=common.GraphDrawStyle.LINE,
        line_width=1,
        fill_opacity=35 if stacked else 8,
        show_points=common.VisibilityMode.NEVER,
        span_nulls=False,
        stacking=common.StackingConfig(mode=common.StackingMode.NORMAL if stacked else common.StackingMode.NONE),
    )
    defaults = dashboard.FieldConfig(unit=unit, min_val=0, max_val=highest, custom=custom)
    if limit is not None:
        defaults.thresholds = Steps("transparent", [(limit, BAD)]).config()
        custom.thresholds_style = common.GraphThresholdsStyleConfig(mode=common.GraphThresholdsStyleMode.DASHED)
    overrides = [_override(legend, _colour(colour)) for legend, colour in (colours or {}).items()]
    if dashed:
        style = dashboard.DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [6, 6]})
        opacity = dashboard.DynamicConfigValue(id_val="custom.fillOpacity", value=0)
        overrides.append(_override(dashed, _colour(FAINT), style, opacity))
    if right:
        placement = dashboard.DynamicConfigValue(id_val="custom.axisPlacement", value="right")
        overrides.append(_override(right[0], dashboard.DynamicConfigValue(id_val="unit", value=right[1]), placement))
    options = timeseries.Options(
        legend=common.VizLegendOptions(
            display_mode=common.LegendDisplayMode.TABLE,
            placement=common.LegendPlacement.BOTTOM,
            show_legend=True,
            calcs=["mean", "max", "lastNotNull"],
        ),
        tooltip=common.VizTooltipOptions(mode=common.TooltipDisplayMode.MULTI, sort=common.SortOrder.DESCENDING),
    )
    return _tile("timeseries", title, description, queries, options, defaults, overrides, width=width, height=8)


def heat(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    axis: str,
    axis_unit: str = "none",
    buckets: bool = False,
    highest: float | None = None,
    width: int = 16,
    height: int = 10,
) -> Tile:
    """A heat map over time: a row for each series, or for each bucket of a histogram."""
    options = heatmap.Options(
        calculate=False,
        color=heatmap.HeatmapColorOptions(
            mode=heatmap.HeatmapColorMode.SCHEME,
            scheme="Viridis",
            fill="dark-blue",
            scale=heatmap.HeatmapColorScale.LINEAR,
            exponent=0.5,
            steps=64,
            min_val=0,
            max_val=highest,
        ),
        rows_frame=heatmap.RowsHeatmapOptions(layout=common.HeatmapCellLayout.AUTO),
        cell_gap=1,
        cell_values=heatmap.CellValues(unit=unit),
        y_axis=heatmap.YAxisConfig(
            axis_label=axis, unit=axis_unit, reverse=False, axis_placement=common.AxisPlacement.LEFT
        ),
        legend=heatmap.HeatmapLegend(show=True),
        tooltip=heatmap.HeatmapTooltip(mode=common.TooltipDisplayMode.SINGLE, y_histogram=False, show_color_scale=True),
        show_value=common.VisibilityMode.NEVER,
    )
    defaults = dashboard.FieldConfig(custom=heatmap.FieldConfig())
    tile = _tile("heatmap", title, description, [query], options, defaults, width=width, height=height)
    if buckets:
        for target in tile.panel.targets or []:
            target.format_val = prometheus.PromQueryFormat.HEATMAP  # type: ignore[attr-defined]
    return tile


def bars(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    steps: Steps = PLAIN,
    highest: float | None = None,
    width: int = 8,
    height: int = 8,
) -> Tile:
    """A bar for each series, newest value."""
    options = bargauge.Options(
        display_mode=common.BarGaugeDisplayMode.BASIC,
        value_mode=common.BarGaugeValueMode.COLOR,
        show_unfilled=True,
        min_viz_width=8,
        min_viz_height=10,
        max_viz_height=24,
        orientation=common.VizOrientation.HORIZONTAL,
        reduce_options=common.ReduceDataOptions(calcs=["lastNotNull"]),
        legend=common.VizLegendOptions(show_legend=False),
    )
    defaults = dashboard.FieldConfig(unit=unit, min_val=0, max_val=highest, thresholds=steps.config())
    query = replace(query, instant=True)
    return _tile("bargauge", title, description, [query], options, defaults, width=width, height=height)


def scatter(
    title: str, description: str, x: Query, y: Query, *, x_unit: str, y_unit: str, y_highest: float, width: int = 8
) -> Tile:
    """A point for each moment of the time range: ``y`` over ``x``, which join by their time."""
    by_name = [xychart.MatcherConfig(id_val="byName", options=query.legend) for query in (x, y)]
    options = xychart.Options(
        mapping=xychart.SeriesMapping.MANUAL,
        series=[
            xychart.XYSeriesConfig(
                name=xychart.XychartXYSeriesConfigName(fixed=title),
                frame=xychart.XychartXYSeriesConfigFrame(matcher=xychart.MatcherConfig(id_val="byIndex", options=0)),
                x=xychart.XychartXYSeriesConfigX(matcher=by_name[0]),
                y=xychart.XychartXYSeriesConfigY(matcher=by_name[1]),
            )
        ],
        legend=common.VizLegendOptions(show_legend=False),
        tooltip=common.VizTooltipOptions(mode=common.TooltipDisplayMode.SINGLE),
    )
    custom = xychart.FieldConfig(
        show=xychart.XYShowMode.POINTS,
        point_size=xychart.XychartFieldConfigPointSize(fixed=4),
        point_shape=xychart.PointShape.CIRCLE,
    )
    defaults = dashboard.FieldConfig(custom=custom, min_val=0)
    overrides = []
    for query, unit in ((x, x_unit), (y, y_unit)):
        values = [
            dashboard.DynamicConfigValue(id_val="unit", value=unit),
            dashboard.DynamicConfigValue(id_val="custom.axisLabel", value=query.legend),
        ]
        if query is y:
            values.append(dashboard.DynamicConfigValue(id_val="max", value=y_highest))
        overrides.append(_override(query.legend, *values))
    tile = _tile("xychart", title, description, [x, y], options, defaults, overrides, width=width, height=8)
    tile.panel.transformations = [dashboard.DataTransformerConfig(id_val="joinByField", options={"byField": "Time"})]
    return tile


@dataclass(frozen=True)
class Column:
    """A column of a table; its query gives one value for each row."""

    name: str
    expr: str
    unit: str = "none"
    steps: Steps | None = None
    words: dict[str, str] | None = None


def grid(
    title: str, description: str, key: str, columns: Sequence[Column], *, labels: dict[str, str], height: int = 8
) -> Tile:
    """A table with a row for each value of the label ``key``, joined by it.

    Args:
        title: of the panel.
        description: what is shown.
        key: label whose values are the rows.
        columns: the first query may bring further ``labels``.
        labels: further labels that become columns, with the name to show.
        height: grid rows.
    """
    queries = [Query(column.expr, column.name, instant=True) for column in columns]
    options = table.Options(show_header=True, cell_height=common.TableCellHeight.SM)
    defaults = dashboard.FieldConfig(custom=common.TableFieldOptions(filterable=False), thresholds=PLAIN.config())
    overrides = []
    for column in columns:
        values = [dashboard.DynamicConfigValue(id_val="unit", value=column.unit)]
        if column.steps:
            values.append(dashboard.DynamicConfigValue(id_val="thresholds", value=column.steps.config().to_json()))
            values.append(dashboard.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-text"}))
        if column.words:
            words = {value: {"text": text, "index": index} for index, (value, text) in enumerate(column.words.items())}
            mapping = {"type": "value", "options": words}
            values.append(dashboard.DynamicConfigValue(id_val="mappings", value=[mapping]))
        overrides.append(_override(column.name, *values))
    tile = _tile("table", title, description, queries, options, defaults, overrides, width=COLUMNS, height=height)
    for target in tile.panel.targets or []:
        target.format_val = prometheus.PromQueryFormat.TABLE  # type: ignore[attr-defined]
    shown = [key, *labels, *(f"Value #{_ref(index)}" for index in range(len(columns)))]
    names = [key, *labels.values(), *(column.name for column in columns)]
    tile.panel.transformations = [
        dashboard.DataTransformerConfig(id_val="joinByField", options={"byField": key, "mode": "outer"}),
        dashboard.DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": shown}}),
        dashboard.DataTransformerConfig(
            id_val="organize",
            options={
                "indexByName": {name: index for index, name in enumerate(shown)},
                "renameByName": dict(zip(shown, names, strict=True)),
            },
        ),
    ]
    return tile


def _tile(
    kind: str,
    title: str,
    description: str,
    queries: Sequence[Query],
    options: object,
    defaults: dashboard.FieldConfig,
    overrides: Sequence[dashboard.DashboardFieldConfigSourceOverrides] = (),
    *,
    width: int,
    height: int,
) -> Tile:
    panel = dashboard.Panel(
        type_val=kind,
        title=title,
        description=description,
        datasource=DATASOURCE,
        targets=[_target(index, query) for index, query in enumerate(queries)],
        options=options,
        field_config=dashboard.FieldConfigSource(defaults=defaults, overrides=list(overrides)),
    )
    return Tile(panel, width, height)


def _target(index: int, query: Query) -> prometheus.Dataquery:
    return prometheus.Dataquery(
        ref_id=_ref(index),
        datasource=DATASOURCE,
        expr=query.expr,
        legend_format=query.legend,
        instant=query.instant,
        range_val=not query.instant,
        format_val=prometheus.PromQueryFormat.TIME_SERIES,
        editor_mode=prometheus.QueryEditorMode.CODE,
    )


def _ref(index: int) -> str:
    return chr(ord("A") + index)


def _override(legend: str, *values: dashboard.DynamicConfigValue) -> dashboard.DashboardFieldConfigSourceOverrides:
    matcher = dashboard.MatcherConfig(id_val="byRegexp", options=f"/^{legend}$/")
    return dashboard.DashboardFieldConfigSourceOverrides(matcher=matcher, properties=list(values))


def _colour(name: str) -> dashboard.DynamicConfigValue:
    return dashboard.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": name})
