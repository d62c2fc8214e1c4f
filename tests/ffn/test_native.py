import subprocess
import sys

import pytest

from sparse_backend.errors import UserError
from sparse_backend.ffn import native

SHOW = "from sparse_backend.ffn import native; print(native.kernel_info().isa)"


def test_the_best_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == native.available_isas()[0]


def test_the_environment_chooses_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "portable"


def test_an_instruction_set_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "sve2")
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "PROSPARSE_CPU_ISA is 'sve2', but this CPU and build offer:" in done.stderr
    before = native.kernel_info()
    with pytest.raises(UserError, match="portable"):
        native.select_isa("sve2")
    assert native.kernel_info() == before


def test_portable_kernels_are_always_there() -> None:
    assert native.available_isas()[-1] == "portable"
    native.require()
