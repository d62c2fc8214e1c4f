"""Settings and key files that hold anything: they are read, or refused in one paragraph."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.auth import KeyRing
from server.settings import Settings
from sparse_backend.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refused(read) -> None:
    try:
        read()
    except UserError as error:
        refusal = str(error)
        assert refusal
        assert "\n" not in refusal
        assert len(refusal) < 2000


@FUZZ
@given(st.dictionaries(st.sampled_from(sorted(Settings.model_fields)), VALUES, max_size=4))
def test_any_value_of_any_setting(tmp_path, values):
    path = tmp_path / "settings.yaml"
    path.write_text(json.dumps(values))
    read_or_refused(lambda: Settings.load({"model": "m", "config": path}))


@pytest.mark.parametrize("name", ["settings.yaml", "settings.toml"])
@FUZZ
@given(st.binary(max_size=100) | st.text(max_size=60).map(str.encode))
def test_any_settings_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    read_or_refused(lambda: Settings.load({"model": "m", "config": path}))


@FUZZ
@given(st.binary(max_size=100) | st.text(max_size=60).map(str.encode))
def test_any_key_file(tmp_path, content):
    path = tmp_path / "keys"
    path.write_bytes(content)
    read_or_refused(lambda: KeyRing([], path))
