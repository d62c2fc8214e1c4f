"""Compiles the CPU kernels into the cache folder, and `prosparse build`, which does so for any kernels ahead of time.

A library lies in ``<cache>/native/<sources>-<compiler>/``: the first half is a hash of the sources and flags, the second of the
compiler. A machine without a compiler uses any library whose sources match, so that an image can be built where a compiler is
and run where none is. build_cuda.py does the same for the CUDA kernels.
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_backend.cache import cache_dir, locked
from sparse_backend.errors import UserError

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "prosparse_ffn.so"

# The oldest torch whose stable ABI a library may rely on: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_FLAGS = (
    # GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
    TORCH_TARGET,
)


@dataclass(frozen=True)
class _Isa:
    """One instruction set: its translation unit is ``csrc/cpu/isa_<name>.cpp``."""

    name: str
    flags: tuple[str, ...]


_AVX512_BF16 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma")
_X86_ISAS = (
    _Isa("avx2", ("-mavx2", "-mfma")),
    _Isa("avx512f", ("-mavx512f", "-mfma")),
    _Isa("avx512_bf16", _AVX512_BF16),
    _Isa("amx", (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16")),
)


class BuildError(Exception):
    """The kernels cannot be compiled here.

    Attributes:
        reason: why, in one short sentence without paths.
        output: what the compiler printed; "" if it did not run.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(f"{reason}:\n{output}" if output else reason)
        self.reason = reason
        self.output = output


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler of this machine."""

    command: tuple[str, ...]
    version: str
    """What it says of itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `prosparse build`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose kernels (default cpu)")
    parser.add_argument(
        "--arch",
        choices=("card", "all"),
        help="for --device cuda: the cards of this machine, or every card from compute capability 8.0 on"
        " (default: card, or all where there is none)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Build the library if it is not there yet, load it, and print what it can do."""
    # Imported here: they import this module.
    from sparse_backend.ffn import build_cuda, native

    if arguments.arch and arguments.device != "cuda":
        raise UserError("--arch chooses among GPUs: give it with --device cuda, or leave it out.")
    try:
        path = build() if arguments.device == "cpu" else build_cuda.build(build_cuda.targets(arguments.arch))
    except BuildError as error:
        raise UserError(f"The kernels could not be compiled: {error}") from None
    print(path)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("not loaded: torch finds no NVIDIA GPU here")
        return 0
    info = native.kernel_info(arguments.device)
    if info.reason:
        raise UserError(f"The kernels were compiled, but cannot be used: {info.reason}.")
    print(f"kernel: {info.name}, instruction set in use: {info.isa}")
    return 0


def build() -> Path:
    """Return the compiled library, compiling it first where needed (half a minute on two cores). Safe to call at once from
    several processes.

    Raises:
        BuildError: there is no compiler, the compiler failed, or the cache folder cannot be written.
    """
    sources = _sources_key()
    compiler = find_compiler()
    if compiler is None:
        built = sorted(libraries_folder().glob(f"{sources}-*/{LIBRARY}"))
        if built:
            return built[0]
        raise BuildError("there is no C++ compiler: install g++ 11 or later, or name one in CXX")
    candidates = _X86_ISAS if platform.machine() in ("x86_64", "AMD64") else ()
    isas = [isa for isa in candidates if _knows(compiler.command, isa.flags)]
    compiler_key = hash_of(shlex.join(compiler.command), compiler.version, *(isa.name for isa in isas))
    library = libraries_folder() / f"{sources}-{compiler_key}" / LIBRARY
    build_once(library, lambda folder: _compile_into(folder, compiler, isas))
    return library


def libraries_folder() -> Path:
    """Where all compiled libraries lie, each in a folder of its own; need not exist yet."""
    return cache_dir() / "native"


def build_once(library: Path, compile_into: Callable[[Path], Path]) -> None:
    """Put a library into its place unless it is there, also if several processes want it at once.

    Args:
        library: its place, in a folder of its own in ``libraries_folder()``.
        compile_into: compiles it into a folder that is removed afterwards, and returns where it is.

    Raises:
        BuildError: the compiler failed, or the cache folder cannot be written.
    """
    root = libraries_folder()
    if library.exists():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / "lock"):
            if library.exists():
                return
            with tempfile.TemporaryDirectory(dir=root, prefix="build-") as folder:
                linked = compile_into(Path(folder))
                library.parent.mkdir(exist_ok=True)
                linked.replace(library)
    except OSError as error:
        raise BuildError(
            "the cache folder cannot be written: set PROSPARSE_CACHE_DIR to one that can",
            f"{error.filename or root}: {error.strerror or error}",
        ) from error


def find_compiler() -> Compiler | None:
    """The C++ compiler that CXX names, else g++; None if there is none.

    Raises:
        BuildError: CXX is no command line.
    """
    command = command_line("CXX", os.environ.get("CXX", "g++"))
    version = version_of(command)
    return None if version is None else Compiler(command, version)


def command_line(variable: str, given: str) -> tuple[str, ...]:
    """The words of the command line that an environment variable holds.

    Raises:
        BuildError: it is none.
    """
    try:
        return tuple(shlex.split(given))
    except ValueError as error:
        raise BuildError(f"{variable} is {given!r}, which is no command line: {str(error).lower()}") from None


def version_of(command: tuple[str, ...]) -> str | None:
    """What a compiler says of itself; None if it does not run."""
    if not command or shutil.which(command[0]) is None:
        return None
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return version.stdout if version.returncode == 0 else None


def _knows(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    check = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def _compile_into(folder: Path, compiler: Compiler, isas: list[_Isa]) -> Path:
    units = {
        "bindings.cpp": [f"-isystem{torch_folder('include')}"],
        "cpu/dispatch.cpp": [f"-DPROSPARSE_ISA_{isa.name.upper()}" for isa in isas],
        "cpu/isa_portable.cpp": [],
        **{f"cpu/isa_{isa.name}.cpp": list(isa.flags) for isa in isas},
    }
    objects = compile_units(folder, [*compiler.command, *_FLAGS], units)
    linked = folder / LIBRARY
    # torch has loaded its own libraries by the time this one is: the names are enough, no search path is recorded.
    libraries = [f"-L{torch_folder('lib')}", "-ltorch_cpu", "-lc10", *shared_runtime(compiler)]
    call([*compiler.command, "-shared", "-Wl,--as-needed", *objects, *libraries, "-o", str(linked)], LIBRARY)
    return linked


def compile_units(folder: Path, command: list[str], units: dict[str, list[str]]) -> list[str]:
    """Compile units, named relative to the sources and each with flags of its own, as many at once as there are processors.

    Returns the object files, which lie in ``folder``.

    Raises:
        BuildError: the compiler failed on one of them.
    """
    objects = [str(folder / f"{Path(unit).stem}.o") for unit in units]

    def compile_unit(unit: str, flags: list[str], output: str) -> None:
        call([*command, *flags, "-c", unit, "-o", output], unit)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(compile_unit, units.keys(), units.values(), objects))
    return objects


def shared_runtime(compiler: Compiler) -> list[str]:
    """The shared libstdc++, where there is one, named before the compiler adds its own choice.

    Some compilers link libstdc++ statically. An error thrown from such a copy into torch's crashes the process.
    """
    name = "libstdc++.so.6"
    found = subprocess.run([*compiler.command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    return [path] if Path(path := found.stdout.strip()).is_absolute() else []


def torch_folder(name: str) -> Path:
    """A folder of the installed torch: "include" or "lib"."""
    return Path(torch.__file__).parent / name


def call(command: list[str], target: str) -> None:
    """Run a compiler from within the sources, so that the file names in a library's messages are relative to them.

    Raises:
        BuildError: it failed; the message quotes it.
    """
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = done.stderr.strip() or done.stdout.strip()
        raise BuildError(f"the compiler failed on {target}", f"{shlex.join(command)}\n{output}")


def _sources_key() -> str:
    flags = [shlex.join(_FLAGS), *(shlex.join(isa.flags) for isa in _X86_ISAS)]
    return hash_of(platform.machine(), *flags, *source_texts("bindings.cpp", "arguments.h", "cpu/*"))


def source_texts(*patterns: str) -> list[str]:
    """Names and contents of all sources that match one of the patterns."""
    files = sorted(file for pattern in patterns for file in SOURCES.glob(pattern))
    return [f"{file.relative_to(SOURCES)}\n{file.read_text()}" for file in files]


def hash_of(*parts: str) -> str:
    """A short name for some texts, which changes with any of them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:16]
