"""The dashboards are what their description generates, are what Grafana's own types allow, and leave nobody guessing."""

import copy
import enum
import json
import types
import typing
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.__main__ import FOLDER, files
from deploy.metrics.queries import boards

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARDS = {board["uid"]: board for board in boards()}
PANELS = [
    pytest.param(panel, id=f"{uid}: {panel['title']}")
    for uid, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]

register_default_plugins()


def test_generating_them_again_gives_the_same_bytes():
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == files(), "run `python -m deploy.grafana`"


@pytest.mark.parametrize("uid", BOARDS)
def test_grafanas_types_know_every_field(uid):
    """Grafana's published types: a field that they do not know is lost on the way through them."""
    loaded = Dashboard.from_json(BOARDS[uid])
    assert json.loads(json.dumps(loaded, cls=JSONEncoder)) == BOARDS[uid]


@pytest.mark.parametrize("uid", BOARDS)
def test_every_value_is_of_the_type_that_grafana_declares(uid):
    assert list(mistyped(Dashboard.from_json(BOARDS[uid]), Dashboard, uid)) == []


def mistyped(value: object, hint: object, path: str) -> typing.Iterator[str]:
    """Where ``value`` departs from a type annotation, down through lists, dictionaries and Grafana's objects."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    # The library reads some lists of objects as they stand.
    if isinstance(value, dict) and isinstance(choices[0], type) and is_grafanas(choices[0]):
        value = choices[0].from_json(value)
    hint = next((choice for choice in choices if fits(value, choice)), None)
    if hint is None:
        yield f"{path}: {value!r} is none of {choices}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from mistyped(item, (*typing.get_args(hint), object)[0], f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from mistyped(item, (*typing.get_args(hint), object, object)[1], f"{path}[{key}]")
    elif is_grafanas(type(value)):
        for name, field in typing.get_type_hints(type(value)).items():
            yield from mistyped(getattr(value, name), field, f"{path}.{name}")


def fits(value: object, hint: object) -> bool:
    """Whether ``value`` itself is of the annotated type; what it holds is not looked at."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is not None:
        return isinstance(value, origin)
    if not isinstance(hint, type):
        return False
    if issubclass(hint, enum.Enum):
        return value in {member.value for member in hint}
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    # A panel's query is declared by its interface.
    return isinstance(value, hint) or (hint is Dataquery and is_grafanas(type(value)))


def is_grafanas(kind: type) -> bool:
    return kind.__module__.startswith("grafana_foundation_sdk.models") and not issubclass(kind, enum.Enum)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (
            lambda board: board["panels"][1]["targets"][0].update(format="tables"),
            "board.panels[1].targets[0].format_val",
        ),
        (lambda board: board["panels"][2]["gridPos"].update(w="3"), "board.panels[2].grid_pos.w"),
        (lambda board: board["panels"][3]["options"].update(colorMode=3), "board.panels[3].options.color_mode"),
    ],
)
def test_the_type_check_sees_a_wrong_type(change, place):
    board = copy.deepcopy(BOARDS["prosparse-service"])
    change(board)
    assert [line.split(": ")[0] for line in mistyped(Dashboard.from_json(board), Dashboard, "board")] == [place]


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_explains_itself(panel):
    assert panel["title"]
    assert panel["description"].endswith("."), "a sentence or more"
    defaults, overrides = panel["fieldConfig"]["defaults"], panel["fieldConfig"]["overrides"]
    properties = {entry["id"] for override in overrides for entry in override["properties"]}
    assert defaults.get("unit") or "unit" in properties or panel["options"]["cellValues"]["unit"]
    for query in panel["targets"]:
        assert query["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert query["legendFormat"] or panel["type"] == "stat", "a series needs a name where there can be several"


@pytest.mark.parametrize("uid", BOARDS)
def test_the_layout_has_no_gap_and_no_overlap(uid):
    panels = BOARDS[uid]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    height = max(y for _, y in cells) + 1
    assert sorted(cells) == [(x, y) for x in range(24) for y in range(height)]


@pytest.mark.parametrize("uid", BOARDS)
def test_the_variables_follow_each_other(uid):
    variables = {variable["name"]: variable for variable in BOARDS[uid]["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "model", "instance"]
    for before, after in pairwise(["job", "model", "instance"]):
        assert f'{before}=~"${before}"' in variables[after]["query"]


def test_the_provisioned_data_source_knows_the_scrape_interval():
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    provisioned = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    assert source["uid"] == "prosparse"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
