from pathlib import Path

import pytest

from sparse_backend.cache import cache_dir


@pytest.mark.parametrize(("variable", "below"), [("PROSPARSE_CACHE_DIR", "kept"), ("XDG_CACHE_HOME", "kept/prosparse")])
def test_a_relative_folder_is_that_of_the_caller(
    variable: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled from another working folder."""
    monkeypatch.delenv("PROSPARSE_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, "kept")
    monkeypatch.chdir(tmp_path)
    assert cache_dir() == tmp_path / below
