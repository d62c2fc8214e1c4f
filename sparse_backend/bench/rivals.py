"""What the op is measured against on a GPU."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from sparse_backend.bench.environment import defaults_in_environment
from sparse_backend.errors import UserError

ActivationKernel = Callable[[torch.Tensor], torch.Tensor]
"""[rows, 2 * d_ff] gate and up values to relu(gate) * up, [rows, d_ff], in one kernel."""


@dataclass(frozen=True)
class FusedActivation:
    """The dense rival's middle step."""

    name: str
    kernel: ActivationKernel


def fused_activation(threshold: float) -> FusedActivation:
    """vLLM's own kernel where vLLM is installed for GPUs; else what torch.compile makes of the same formula."""
    try:
        # vLLM logs to stdout, where our document goes.
        with defaults_in_environment({"VLLM_LOGGING_LEVEL": "ERROR"}):
            from vllm.platforms import current_platform

            current_platform.import_kernels()
        operator = torch.ops._C.fatrelu_and_mul
    except (ImportError, AttributeError):
        return FusedActivation(
            "torch.compile", torch.compile(lambda values: _activation(values, threshold), dynamic=True)
        )

    def kernel(values: torch.Tensor) -> torch.Tensor:
        result = values.new_empty(values.shape[0], values.shape[1] // 2)
        operator(result, values, threshold)
        return result

    return FusedActivation("vLLM's fatrelu_and_mul", kernel)


def _activation(values: torch.Tensor, threshold: float) -> torch.Tensor:
    gate, up = values.chunk(2, dim=1)
    return F.threshold(gate, threshold, 0.0) * up


class TwoOperatorFFN:
    """cuBLAS for the gate, then the two operators of the ProSparse paper (arXiv 2402.13516, section 4.3) from a shared library.

    Theirs are at https://github.com/Raincleared-Song/sparse_gpu_operator, under ``kernel/``. The second has the 7B model's shape
    built in; both take one row of bfloat16, and launch on the default stream, which must be the thread's own to be captured:

        nvcc -O3 -arch=native --default-stream per-thread -shared -Xcompiler -fPIC -o operators.so kernel/*.cu
    """

    D_MODEL, D_FF = 4096, 11008

    def __init__(self, library: Path) -> None:
        """Load the library.

        Raises:
            UserError: it cannot be loaded, or lacks one of the operators.
        """
        try:
            loaded = ctypes.CDLL(str(library.absolute()))
        except OSError as error:
            raise UserError(f"--rival: {error}. Give a shared library that this machine can load.") from None
        self._up = _symbol(loaded, library, "launch_ffn_fuse_23", "_Z18launch_ffn_fuse_23P13__nv_bfloat16S0_S0_S0_jjf")
        self._down = _symbol(loaded, library, "launch_ffn_4", "_Z12launch_ffn_4P13__nv_bfloat16S0_S0_jj")

    @property
    def stream(self) -> torch.cuda.Stream:
        """The thread's default stream, on which the operators launch."""
        return torch.cuda.ExternalStream(2)  # cudaStreamPerThread

    def __call__(self, x: torch.Tensor, gate_up: torch.Tensor, down_t: torch.Tensor, threshold: float) -> torch.Tensor:
        """One row x [1, 4096]; gate_up [2 * 11008, 4096] and down_t [11008, 4096] as our op takes them. On ``stream`` only."""
        d_ff, d_model = down_t.shape
        gate = F.linear(x, gate_up[:d_ff])
        hidden, y = torch.empty_like(gate), torch.empty_like(x)
        rows, columns = ctypes.c_uint(d_model), ctypes.c_uint(d_ff)
        self._up(_at(gate), _at(x), _at(gate_up[d_ff:]), _at(hidden), rows, columns, ctypes.c_float(threshold))
        self._down(_at(down_t), _at(hidden), _at(y), columns, rows)
        return y


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _symbol(library: ctypes.CDLL, file: Path, name: str, mangled: str) -> Callable[..., None]:
    """A function without result, under the name a C++ compiler gives it or its plain one."""
    for symbol in (mangled, name):
        if hasattr(library, symbol):
            function: Callable[..., None] = library[symbol]
            function.restype = None  # type: ignore[attr-defined]
            return function
    raise UserError(f"--rival: {file} has no function {name}. Build it from the published operators' kernel/*.cu.")
