from pathlib import Path

import pytest
import torch

from sparse_backend.bench import rivals
from sparse_backend.errors import UserError
from sparse_backend.ffn import native


def test_a_library_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "operators.so"
    file.write_text("text")
    with pytest.raises(UserError, match=r"--rival: .*operators\.so"):
        rivals.TwoOperatorFFN(file)


def test_a_library_without_the_operators_is_refused() -> None:
    library = native._library("cpu")
    assert not isinstance(library, Exception)
    with pytest.raises(UserError, match="has no function launch_ffn_fuse_23"):
        rivals.TwoOperatorFFN(Path(library._name))


def test_the_stand_in_is_relu_times_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    activation = rivals.fused_activation(0.5)
    assert activation.name == "torch.compile"
    values = torch.tensor([[1.0, 0.5, -2.0, 3.0, 4.0, 5.0]])
    assert activation.kernel(values).tolist() == [[3.0, 0.0, 0.0]]
