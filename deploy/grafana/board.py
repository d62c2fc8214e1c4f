"""A whole dashboard: its rows laid out, and the variables, links and annotations that all of them share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.models import dashboard

from deploy.grafana.panels import BAD, COLUMNS, DATASOURCE, Tile


@dataclass(frozen=True)
class Row:
    """A titled row of the board; tiles flow from left to right and wrap at 24 columns."""

    title: str
    tiles: Sequence[Tile]


def board(uid: str, title: str, description: str, rows: Sequence[Row]) -> dashboard.Dashboard:
    """A whole dashboard: its rows laid out, with the variables, links and annotations that all boards share."""
    return dashboard.Dashboard(
        uid=uid,
        title=title,
        description=description,
        tags=["prosparse"],
        timezone="browser",
        graph_tooltip=dashboard.DashboardCursorSync.CROSSHAIR,
        time=dashboard.DashboardDashboardTime(from_val="now-1h", to="now"),
        refresh="30s",
        panels=list(_lay_out(rows)),
        templating=dashboard.DashboardDashboardTemplating(list_val=_variables()),
        annotations=dashboard.AnnotationContainer(list_val=[_alerts()]),
        links=[
            dashboard.DashboardLink(
                title="ProSparse",
                type_val=dashboard.DashboardLinkType.DASHBOARDS,
                tags=["prosparse"],
                as_dropdown=False,
                include_vars=True,
                keep_time=True,
            )
        ],
    )


def _variables() -> list[dashboard.VariableModel]:
    datasource = dashboard.VariableModel(
        type_val=dashboard.VariableType.DATASOURCE,
        name="datasource",
        label="Data source",
        description="The Prometheus that scrapes the servers.",
        query="prometheus",
        refresh=dashboard.VariableRefresh.ON_DASHBOARD_LOAD,
    )
    return [
        datasource,
        _choice("job", "Job", "Scrape job in Prometheus.", "label_values(sparse_server_info, job)"),
        _choice(
            "model",
            "Model",
            "Name that clients give as `model`.",
            'label_values(sparse_server_info{job=~"$job"}, model)',
        ),
        _choice(
            "instance",
            "Instance",
            "One server; those that serve the chosen models.",
            'label_values(sparse_server_info{job=~"$job", model=~"$model"}, instance)',
        ),
    ]


def _choice(name: str, label_text: str, description: str, query: str) -> dashboard.VariableModel:
    everything = dashboard.VariableOption(selected=True, text=["All"], value=["$__all"])
    return dashboard.VariableModel(
        type_val=dashboard.VariableType.QUERY,
        name=name,
        label=label_text,
        description=description,
        datasource=DATASOURCE,
        query=query,
        definition=query,
        multi=True,
        include_all=True,
        current=everything,
        refresh=dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED,
        sort=dashboard.VariableSort.ALPHABETICAL_ASC,
    )


def _alerts() -> dashboard.AnnotationQuery:
    return dashboard.AnnotationQuery(
        name="Alerts",
        datasource=DATASOURCE,
        enable=True,
        icon_color=BAD,
        expr='ALERTS{alertname=~"ProSparse.*", alertstate="firing", job=~"$job"}',
        title_format="{{alertname}}",
        tag_keys="instance,slo",
        step="60s",
    )


def _lay_out(rows: Sequence[Row]) -> Iterator[dashboard.Panel | dashboard.RowPanel]:
    y = panel_id = 0
    for row in rows:
        panel_id += 1
        yield dashboard.RowPanel(
            id_val=panel_id, title=row.title, collapsed=False, grid_pos=dashboard.GridPos(x=0, y=y, w=COLUMNS, h=1)
        )
        y += 1
        x = tallest = 0
        for tile in row.tiles:
            if x + tile.width > COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            panel_id += 1
            tile.panel.id_val = panel_id
            tile.panel.grid_pos = dashboard.GridPos(x=x, y=y, w=tile.width, h=tile.height)
            yield tile.panel
            x, tallest = x + tile.width, max(tallest, tile.height)
        y += tallest
