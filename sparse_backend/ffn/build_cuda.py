"""Compiles the CUDA kernels with nvcc into the cache folder, into a library of their own beside that of the CPU kernels.

It lies in ``<cache>/native/<sources>-<compiler>-<targets>/``, where targets are the cards it is for: their names, such as
"sm_90a", or "all". A machine without nvcc uses any library whose sources match and whose targets include its cards.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
from pathlib import Path

import torch

from sparse_backend.ffn import build as builds
from sparse_backend.ffn.build import BuildError

LIBRARY = "prosparse_ffn_cuda.so"

# Compute capability 9.0 is compiled as sm_90a: the same cards, with the instructions that only Hopper has.
_TARGETS = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a"}

ALL = frozenset({"all"})
"""Every card from compute capability 8.0 on: machine code for those of ``_TARGETS``, and for later ones PTX of 9.0, which the
driver compiles when the library is loaded."""

_FLAGS = (
    *("-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", builds.TORCH_TARGET),
    # The CUDA runtime is linked statically, its names hidden: torch has one of its own, which may be of another release.
    *("-cudart=static", "-Xlinker=--exclude-libs=ALL"),
)

WARNINGS_ARE_ERRORS = ("-Werror=all-warnings",)
"""Flags for a check of the sources; a user's build must not fail because a newer compiler warns of more."""


def cards() -> frozenset[str]:
    """The targets of this machine's GPUs.

    Raises:
        BuildError: there is none, or one of them is too old.
    """
    if not torch.cuda.is_available():
        raise BuildError("torch finds no NVIDIA GPU here")
    capabilities = {torch.cuda.get_device_capability(card) for card in range(torch.cuda.device_count())}
    if min(capabilities) < min(_TARGETS):
        raise BuildError("a GPU here is older than compute capability 8.0: hide it with CUDA_VISIBLE_DEVICES")
    return frozenset(_TARGETS[each] for each in capabilities) if capabilities <= _TARGETS.keys() else ALL


def targets(arch: str | None) -> frozenset[str]:
    """What `prosparse build --arch` means: "card", "all", or None for the cards of this machine if it has any.

    Raises:
        BuildError: "card" was asked for where there is none.
    """
    return ALL if arch == "all" or (arch is None and not torch.cuda.is_available()) else cards()


def build(wanted: frozenset[str], extra_flags: tuple[str, ...] = ()) -> Path:
    """Return a library for the targets, compiling it first where needed. Safe to call at once from several processes.

    Args:
        wanted: the targets, ``cards()`` or ``ALL``.
        extra_flags: for nvcc; a library compiled with others is another library.

    Raises:
        BuildError: there is no nvcc, it failed, or the cache folder cannot be written.
    """
    sources = builds.hash_of(
        platform.machine(),
        *(*_FLAGS, *extra_flags, *_TARGETS.values()),
        *builds.source_texts("bindings_cuda.cpp", "arguments.h", "cuda/*"),
    )
    nvcc = _find_nvcc()
    compiler = builds.find_compiler()
    if isinstance(nvcc, BuildError) or compiler is None:
        if built := _find_built(f"{sources}-*", wanted):
            return built
        raise nvcc if isinstance(nvcc, BuildError) else BuildError("nvcc needs a C++ compiler: install g++")
    compilers = builds.hash_of(shlex.join(nvcc.command), nvcc.version, shlex.join(compiler.command), compiler.version)
    if built := _find_built(f"{sources}-{compilers}-*", wanted):
        return built
    library = builds.libraries_folder() / f"{sources}-{compilers}-{'+'.join(sorted(wanted))}" / LIBRARY
    builds.build_once(library, lambda folder: _compile_into(folder, nvcc, compiler, wanted, extra_flags))
    return library


def _find_built(pattern: str, wanted: frozenset[str]) -> Path | None:
    for library in sorted(builds.libraries_folder().glob(f"{pattern}/{LIBRARY}")):
        built = frozenset(library.parent.name.split("-")[2].split("+"))
        if built == ALL or wanted <= built:
            return library
    return None


def _find_nvcc() -> builds.Compiler | BuildError:
    """The nvcc that NVCC or CUDACXX names, else that of CUDA_HOME, PATH, /usr/local/cuda or NVIDIA's Python packages."""
    for variable in ("NVCC", "CUDACXX"):
        if given := os.environ.get(variable):
            candidates = [builds.command_line(variable, given)]
            break
    else:
        home = os.environ.get("CUDA_HOME")
        places = [Path(home) / "bin" / "nvcc"] if home else []
        places += [Path(found)] if (found := shutil.which("nvcc")) else []
        places += [Path("/usr/local/cuda/bin/nvcc"), *_packaged_nvccs()]
        candidates = [(str(place),) for place in places]
    for command in candidates:
        if version := builds.version_of(command):
            return _fitting(builds.Compiler(command, version))
    return BuildError("there is no nvcc: install the CUDA toolkit, 12.0 or later, or name its nvcc in NVCC")


def _packaged_nvccs() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    return sorted((nvcc for folder in folders for nvcc in Path(folder).glob("cu*/bin/nvcc")), reverse=True)


def _fitting(nvcc: builds.Compiler) -> builds.Compiler | BuildError:
    """nvcc, if a driver that runs torch also runs what it compiles: within one major release every driver does."""
    release = re.search(r"release (\d+)\.", nvcc.version)
    if release and torch.version.cuda and int(release[1]) > int(torch.version.cuda.split(".")[0]):
        return BuildError(
            f"nvcc is of CUDA {release[1]}, but torch of CUDA {torch.version.cuda}: install a toolkit no newer than torch's,"
            " or name its nvcc in NVCC"
        )
    return nvcc


def _compile_into(
    folder: Path,
    nvcc: builds.Compiler,
    compiler: builds.Compiler,
    wanted: frozenset[str],
    extra_flags: tuple[str, ...],
) -> Path:
    names = sorted(_TARGETS.values() if wanted == ALL else wanted)
    codes = [f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}" for name in names]
    codes += ["-gencode=arch=compute_90,code=compute_90"] if wanted == ALL else []
    kernels = [str(file.relative_to(builds.SOURCES)) for file in sorted(builds.SOURCES.glob("cuda/*.cu"))]
    units = {"bindings_cuda.cpp": ["-isystem", str(builds.torch_folder("include"))], **dict.fromkeys(kernels, codes)}
    command = [*nvcc.command, *_FLAGS, *extra_flags, f"--threads={os.cpu_count()}"]
    objects = builds.compile_units(folder, command, units)
    linked = folder / LIBRARY
    libraries = [f"-L{builds.torch_folder('lib')}", "-ltorch_cpu", "-lc10"]
    libraries += [f"-Xlinker={path}" for path in builds.shared_runtime(compiler)]
    builds.call([*command, "-shared", *objects, *libraries, "-o", str(linked)], LIBRARY)
    return linked
