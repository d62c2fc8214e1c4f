"""Finds, builds and loads the native libraries, each once per process, and says which kernels are in use.

Device types are torch's: "cpu" and "cuda" have kernels, each in a library of its own.
"""

import ctypes
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_backend.errors import UserError
from sparse_backend.ffn import build, build_cuda
from sparse_backend.ffn.build import BuildError

logger = logging.getLogger(__name__)

ISA_VARIABLE = "PROSPARSE_CPU_ISA"

# The order of the enumeration in csrc/cuda/kernels.h.
_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class KernelInfo:
    """Which implementation computes the op."""

    name: str
    """"cpu" or "cuda": the native kernels. "reference": plain PyTorch, always on the dense path."""
    isa: str
    """Instruction set in use, such as "avx512_bf16", or the GPU's, such as "sm_90"; "" for the reference."""
    reason: str
    """Why the reference is in use, in one short sentence; "" otherwise."""


@functools.cache
def _library(device_type: str = "cpu") -> ctypes.CDLL | BuildError:
    """The loaded library, or why there is none."""
    try:
        path = _build(device_type)
    except BuildError as error:
        return error
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return BuildError("the compiled library cannot be loaded", str(error))
    if device_type == "cuda":
        library.prosparse_cuda_max_rows.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    else:
        library.prosparse_available_isas.restype = ctypes.c_char_p
        library.prosparse_selected_isa.restype = ctypes.c_char_p
        library.prosparse_select_isa.argtypes = [ctypes.c_char_p]
    return library


def _build(device_type: str) -> Path:
    if device_type == "cpu":
        return build.build()
    if device_type == "cuda":
        return build_cuda.build(build_cuda.cards())
    raise BuildError(f"there are no {device_type} kernels")


@functools.cache
def load(device_type: str = "cpu") -> bool:
    """Load the library, building it first where needed. True if the kernels are in use, False for the reference.

    Building takes half a minute to a few minutes, and must not happen while a CUDA graph is captured: call this before.

    Raises:
        UserError: ``PROSPARSE_CPU_ISA`` names an instruction set that this build or this CPU lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE) if device_type == "cpu" else None
    if isinstance(_library(device_type), BuildError):
        return False
    if wanted:
        select_isa(wanted)
    return True


def kernel_info(device_type: str = "cpu") -> KernelInfo:
    """Which implementation is in use for tensors on a device type; on "cuda", on torch's current GPU."""
    load(device_type)
    library = _library(device_type)
    if isinstance(library, BuildError):
        return KernelInfo("reference", "", library.reason)
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return KernelInfo("cuda", f"sm_{major}{minor}", "")
    return KernelInfo("cpu", library.prosparse_selected_isa().decode(), "")


def max_rows(dtype: torch.dtype, d_model: int) -> int:
    """Up to how many rows the CUDA kernels' sparse path takes on torch's current GPU; 0 without kernels for the dtype.

    More rows take the dense path whatever ``max_sparse_rows`` says.
    """
    library = _library("cuda")
    if isinstance(library, BuildError) or dtype not in _CUDA_DTYPES:
        return 0
    most: int = library.prosparse_cuda_max_rows(torch.cuda.current_device(), _CUDA_DTYPES.index(dtype), d_model)
    return most


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this CPU can run, best first; empty without the library."""
    library = _library()
    return [] if isinstance(library, BuildError) else library.prosparse_available_isas().decode().split(",")


def select_isa(isa: str) -> None:
    """Take the CPU kernels of one instruction set into use, for the whole process.

    Raises:
        UserError: it is not among ``available_isas()``.
    """
    library = _library()
    if isinstance(library, BuildError) or not library.prosparse_select_isa(isa.encode()):
        raise UserError(
            f"{ISA_VARIABLE} is {isa!r}, but this CPU and build offer: {', '.join(available_isas()) or 'none'}."
            " Set it to one of these, or unset it to take the best."
        )


@functools.cache
def warn_of_reference(device_type: str) -> None:
    """Log, once per process, that and why the reference computes on a device type.

    Not logged on loading: a command that needs the kernels refuses to run without them and says so itself.
    """
    error = _library(device_type)
    if isinstance(error, BuildError):
        logger.warning(
            "The native %s kernels are not in use, plain PyTorch computes every layer densely: %s", device_type, error
        )


def require(device_type: str = "cpu") -> None:
    """Refuse to go on without the native kernels, for commands that are about nothing else.

    Raises:
        UserError: the reference is in use.
    """
    if not load(device_type):
        raise UserError(
            f"This needs the native {device_type} kernels, which are not in use: {kernel_info(device_type).reason}."
            f" `prosparse build --device {device_type}` says more."
        )


def library_key(device_type: str = "cpu") -> str:
    """A name for the loaded build: changes with sources, flags and compiler. "reference" without the library."""
    library = _library(device_type)
    return "reference" if isinstance(library, BuildError) else Path(library._name).parent.name
