import logging
import subprocess
import sys

import pytest
import torch

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
    before = native.kernel_info()
    monkeypatch.setenv(native.ISA_VARIABLE, "sve2")
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "PROSPARSE_CPU_ISA is 'sve2', but this CPU and build offer:" in done.stderr
    with pytest.raises(UserError, match="portable"):
        native.select_isa("sve2")
    assert native.kernel_info() == before


def test_portable_kernels_are_always_there() -> None:
    assert native.available_isas()[-1] == "portable"
    native.require()


def test_importing_the_op_builds_and_loads_nothing() -> None:
    script = "import sparse_backend.ffn.op; from sparse_backend.ffn import native; print(native._library.cache_info().misses)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_there_are_no_cuda_kernels(caplog: pytest.LogCaptureFixture) -> None:
    reason = "torch finds no NVIDIA GPU here"
    assert native.kernel_info("cuda") == native.KernelInfo("reference", "", reason)
    assert native.max_rows(torch.bfloat16, 4096) == 0
    assert native.library_key("cuda") == "reference"
    with pytest.raises(UserError, match=f"native cuda kernels.*{reason}"):
        native.require("cuda")
    native.warn_of_reference.cache_clear()
    with caplog.at_level(logging.WARNING):
        native.warn_of_reference("cuda")
        native.warn_of_reference("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        f"The native cuda kernels are not in use, plain PyTorch computes every layer densely: {reason}"
    ]


def test_other_devices_have_the_reference() -> None:
    assert native.kernel_info("xpu").reason == "there are no xpu kernels"
