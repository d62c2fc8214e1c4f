"""Compiles the native kernels into the cache folder, and `prosparse build`, which does so ahead of time.

A library lies in ``<cache>/native/<sources>-<compiler>/``: the first half is a hash of the sources and flags, the second of the
compiler. A machine without a compiler uses any library whose sources match, so that an image can be built where a compiler is
and run where none is.
"""

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_backend.cache import cache_dir, locked
from sparse_backend.errors import UserError

SOURCES = Path(__file__).parent / "csrc"
LIBRARY = "prosparse_ffn.so"

# The oldest torch whose stable ABI the library may rely on: 2.11.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
_FLAGS = (
    # GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-maybe-uninitialized"),
    _TORCH_TARGET,
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
class _Compiler:
    command: tuple[str, ...]
    version: str
    isas: tuple[_Isa, ...]
    """Those whose flags it knows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`prosparse build` has no options."""


def run(_arguments: argparse.Namespace) -> int:
    """Build the library if it is not there yet, load it, and print what it can do."""
    # Imported here: native imports this module.
    from sparse_backend.ffn import native

    try:
        path = build()
    except BuildError as error:
        raise UserError(f"The kernels could not be compiled: {error}") from None
    info = native.kernel_info()
    print(f"{path}\nkernel: {info.name}, instruction set in use: {info.isa}")
    return 0


def build() -> Path:
    """Return the compiled library, compiling it first where needed (half a minute on two cores). Safe to call at once from
    several processes.

    Raises:
        BuildError: there is no compiler, the compiler failed, or the cache folder cannot be written.
    """
    root = cache_dir() / "native"
    sources = _sources_key()
    compiler = _find_compiler()
    if compiler is None:
        built = sorted(root.glob(f"{sources}-*/{LIBRARY}"))
        if built:
            return built[0]
        raise BuildError("there is no C++ compiler: install g++ 11 or later, or name one in CXX")
    compiler_key = _hash(shlex.join(compiler.command), compiler.version, *(isa.name for isa in compiler.isas))
    library = root / f"{sources}-{compiler_key}" / LIBRARY
    if library.exists():
        return library
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / "lock"):
            if not library.exists():
                _compile_into(library, compiler)
    except OSError as error:
        raise BuildError(
            "the cache folder cannot be written: set PROSPARSE_CACHE_DIR to one that can",
            f"{error.filename or root}: {error.strerror or error}",
        ) from error
    return library


def _find_compiler() -> _Compiler | None:
    given = os.environ.get("CXX", "g++")
    try:
        command = tuple(shlex.split(given))
    except ValueError as error:
        raise BuildError(f"CXX is {given!r}, which is no command line: {str(error).lower()}") from None
    if not command or shutil.which(command[0]) is None:
        return None
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if version.returncode != 0:
        return None
    candidates = _X86_ISAS if platform.machine() in ("x86_64", "AMD64") else ()
    isas = tuple(isa for isa in candidates if _knows(command, isa.flags))
    return _Compiler(command, version.stdout, isas)


def _knows(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    check = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def _compile_into(library: Path, compiler: _Compiler) -> None:
    torch_root = Path(torch.__file__).parent
    units = {
        "bindings.cpp": [f"-isystem{torch_root / 'include'}"],
        "cpu/dispatch.cpp": [f"-DPROSPARSE_ISA_{isa.name.upper()}" for isa in compiler.isas],
        "cpu/isa_portable.cpp": [],
        **{f"cpu/isa_{isa.name}.cpp": list(isa.flags) for isa in compiler.isas},
    }
    with tempfile.TemporaryDirectory(dir=library.parents[1], prefix="build-") as folder:
        objects = [Path(folder) / f"{Path(unit).stem}.o" for unit in units]

        def compile_unit(unit: str, flags: list[str], output: Path) -> None:
            _call([*compiler.command, *_FLAGS, *flags, "-c", unit, "-o", str(output)], unit)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(compile_unit, units.keys(), units.values(), objects))
        linked = Path(folder) / LIBRARY
        # torch has loaded its own libraries by the time this one is: the names are enough, no search path is recorded.
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10", *_shared_runtime(compiler)]
        _call(
            [*compiler.command, "-shared", "-Wl,--as-needed", *map(str, objects), *libraries, "-o", str(linked)],
            LIBRARY,
        )
        library.parent.mkdir(exist_ok=True)
        linked.replace(library)


def _shared_runtime(compiler: _Compiler) -> list[str]:
    """The shared libstdc++, where there is one, named before the compiler adds its own choice.

    Some compilers link libstdc++ statically. An error thrown from such a copy into torch's crashes the process.
    """
    name = "libstdc++.so.6"
    found = subprocess.run([*compiler.command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    return [path] if Path(path := found.stdout.strip()).is_absolute() else []


def _call(command: list[str], target: str) -> None:
    # From within the sources, so that the file names in the library's messages are relative to them.
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = done.stderr.strip() or done.stdout.strip()
        raise BuildError(f"the C++ compiler failed on {target}", f"{shlex.join(command)}\n{output}")


def _sources_key() -> str:
    files = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
    texts = [f"{path.relative_to(SOURCES)}\n{path.read_text()}" for path in files]
    flags = [shlex.join(_FLAGS), *(shlex.join(isa.flags) for isa in _X86_ISAS)]
    return _hash(platform.machine(), *flags, *texts)


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:16]
