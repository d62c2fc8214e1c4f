"""Finds, builds and loads the native library, once per process, and says which kernels are in use."""

import ctypes
import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_backend.errors import UserError
from sparse_backend.ffn import build

logger = logging.getLogger(__name__)

ISA_VARIABLE = "PROSPARSE_CPU_ISA"


@dataclass(frozen=True)
class KernelInfo:
    """Which implementation computes the op."""

    name: str
    """"cpu": the native kernels. "reference": plain PyTorch, always on the dense path."""
    isa: str
    """Instruction set in use, such as "avx512_bf16"; "" for the reference."""
    reason: str
    """Why the reference is in use, in one short sentence; "" otherwise."""


@functools.cache
def _library() -> ctypes.CDLL | build.BuildError:
    """The loaded library, or why there is none."""
    try:
        path = build.build()
    except build.BuildError as error:
        return error
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return build.BuildError("the compiled library cannot be loaded", str(error))
    library.prosparse_available_isas.restype = ctypes.c_char_p
    library.prosparse_selected_isa.restype = ctypes.c_char_p
    library.prosparse_select_isa.argtypes = [ctypes.c_char_p]
    return library


@functools.cache
def load() -> bool:
    """Load the library, building it first where needed. True if the kernels are in use, False for the reference.

    Raises:
        UserError: ``PROSPARSE_CPU_ISA`` names an instruction set that this build or this CPU lacks.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if isinstance(_library(), build.BuildError):
        return False
    if wanted:
        select_isa(wanted)
    return True


def kernel_info(device_type: str = "cpu") -> KernelInfo:
    """Which implementation is in use for tensors on a device type ("cpu", "cuda")."""
    if device_type != "cpu":
        return KernelInfo("reference", "", f"there are no {device_type} kernels yet")
    load()
    library = _library()
    if isinstance(library, build.BuildError):
        return KernelInfo("reference", "", library.reason)
    return KernelInfo("cpu", library.prosparse_selected_isa().decode(), "")


def available_isas() -> list[str]:
    """Instruction sets that this build holds and this CPU can run, best first; empty without the library."""
    library = _library()
    return [] if isinstance(library, build.BuildError) else library.prosparse_available_isas().decode().split(",")


def select_isa(isa: str) -> None:
    """Take the kernels of one instruction set into use, for the whole process.

    Raises:
        UserError: it is not among ``available_isas()``.
    """
    library = _library()
    if isinstance(library, build.BuildError) or not library.prosparse_select_isa(isa.encode()):
        raise UserError(
            f"{ISA_VARIABLE} is {isa!r}, but this CPU and build offer: {', '.join(available_isas()) or 'none'}."
            " Set it to one of these, or unset it to take the best."
        )


@functools.cache
def warn_of_reference() -> None:
    """Log, once per process, that and why the reference computes on the CPU.

    Not logged on loading: a command that needs the kernels refuses to run without them and says so itself.
    """
    error = _library()
    if isinstance(error, build.BuildError):
        logger.warning("The native kernels are not in use, plain PyTorch computes every layer densely: %s", error)


def require() -> None:
    """Refuse to go on without the native kernels, for commands that are about nothing else.

    Raises:
        UserError: the reference is in use.
    """
    if not load():
        raise UserError(
            f"This needs the native kernels, which are not in use: {kernel_info().reason}. `prosparse build` says more."
        )


def library_key() -> str:
    """A name for the loaded build: changes with sources, flags and compiler. "reference" without the library."""
    library = _library()
    return "reference" if isinstance(library, build.BuildError) else Path(library._name).parent.name
