"""Folders that somebody damaged on purpose: each is opened, or refused in one paragraph."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_backend.checkpoint import MANIFEST_NAME, Checkpoint
from sparse_backend.errors import UserError
from tests.checkpoints import write_tiny_checkpoint

DEMO = Path(__file__).parents[1] / "deploy" / "demo"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    copy = shutil.copytree(DEMO, tmp_path_factory.mktemp("fuzz") / "demo")
    (copy / MANIFEST_NAME).chmod(0o644)
    return copy


def opened_or_refused(folder: Path, *, verify: bool = True) -> None:
    try:
        Checkpoint.open(folder, verify=verify)
    except UserError as error:
        refusal = str(error)
        assert refusal
        assert "\n" not in refusal


@FUZZ
@given(st.data())
def test_any_value_in_a_field_of_the_config(folder, data):
    path = folder / "config.json"
    sound = path.read_text()
    config = json.loads(sound)
    names = st.sampled_from(sorted(config)) | st.sampled_from(
        ["hidden_act_param", "rope_scaling", "mlp_bias", "head_dim"]
    )
    try:
        path.write_text(json.dumps(config | data.draw(st.dictionaries(names, JSON, max_size=3))))
        opened_or_refused(folder)
    finally:
        path.write_text(sound)


@FUZZ
@given(st.data())
def test_any_value_in_a_field_of_the_manifest(demo, data):
    path = demo / MANIFEST_NAME
    sound = path.read_text()
    manifest = json.loads(sound)
    places = [manifest, manifest["held_out"], manifest["corpus"], manifest["layers"][0], manifest["phases"][0]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(JSON)
    try:
        path.write_text(json.dumps(manifest))
        opened_or_refused(demo, verify=False)
    finally:
        path.write_text(sound)


@FUZZ
@given(
    st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
    st.binary(max_size=300),
)
def test_any_bytes_in_a_file(folder, name, content):
    path = folder / name
    sound = path.read_bytes() if path.exists() else None
    try:
        path.write_bytes(content)
        opened_or_refused(folder)
    finally:
        path.unlink() if sound is None else path.write_bytes(sound)


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside.json", "loop.json"])
@pytest.mark.parametrize("place", ["loop.json", "sub/loop.json"])
def test_links_that_leave_the_folder_are_refused(folder, tmp_path, place, target):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "outside.json").write_text("{}")
    (copy / "sub").mkdir()
    if place.startswith("sub/") and target == "../outside.json":
        target = "../../outside.json"
    (copy / place).symlink_to(target)
    with pytest.raises(UserError, match="leaves the checkpoint's folder"):
        Checkpoint.open(copy)


def test_links_inside_the_folder_and_to_it_are_followed(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "blobs").mkdir()
    (copy / "config.json").rename(copy / "blobs" / "config")
    (copy / "config.json").symlink_to("blobs/config")
    (tmp_path / "link").symlink_to(copy)
    assert Checkpoint.open(tmp_path / "link").n_layers > 0
