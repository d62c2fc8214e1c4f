import argparse
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparse_backend.errors import UserError
from sparse_backend.ffn import build, build_cuda
from sparse_backend.ffn.build_cuda import ALL

HOPPER = frozenset({"sm_90a"})
AMPERE = frozenset({"sm_80"})

# Answers --version, notes what else it is asked, and writes each output file.
FAKE = """#!/bin/sh
[ "${*##*--version}" = "" ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; }
echo "$*" >> "$0.log"
while [ "$1" != -o ]; do shift; done
sleep 0.05
echo built > "$2"
"""
FAILS = """#!/bin/sh
[ "${*##*--version}" = "" ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; }
echo "error: no such thing as a warp" >&2
exit 1
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nvcc(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "nvcc"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("NVCC", str(path))
    return path


def calls(nvcc: Path, word: str) -> list[str]:
    return [line for line in (nvcc.parent / "nvcc.log").read_text().splitlines() if word in line]


def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")


def cards(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capabilities[card])


# ---- which cards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "targets"),
    [
        ([(9, 0), (9, 0)], HOPPER),
        ([(8, 0), (8, 9)], {"sm_80", "sm_89"}),
        ([(8, 6)], {"sm_86"}),
        # Not compiled for by name: runs the machine code of 8.6, and PTX.
        ([(8, 7)], ALL),
        ([(12, 0)], ALL),
        ([(9, 0), (10, 0)], ALL),
    ],
)
def test_a_machine_builds_for_its_own_cards(
    capabilities: list[tuple[int, int]], targets: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, *capabilities)
    assert build_cuda.cards() == targets


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [([], "torch finds no NVIDIA GPU here"), ([(9, 0), (7, 5)], "a GPU here is older than compute capability 8.0")],
)
def test_machines_without_a_fitting_card_are_told(
    capabilities: list[tuple[int, int]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, *capabilities)
    with pytest.raises(build.BuildError, match=reason):
        build_cuda.cards()


def test_all_is_machine_code_and_ptx(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvcc(tmp_path, FAKE, monkeypatch)
    build_cuda.build(ALL)
    kernels = calls(fake, "-c cuda/")
    assert kernels
    for call in kernels:
        codes = re.findall(r"-gencode=arch=(\w+),code=(\w+)", call)
        assert codes == [
            *[("compute_80", "sm_80"), ("compute_86", "sm_86"), ("compute_89", "sm_89"), ("compute_90a", "sm_90a")],
            ("compute_90", "compute_90"),
        ]


# ---- the cache ---------------------------------------------------------------------------------------------------------------


def test_processes_at_once_build_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvcc(tmp_path, FAKE, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        built = {future.result() for future in [pool.submit(build_cuda.build, HOPPER) for _ in range(4)]}
    assert len(built) == 1
    assert built.pop().read_text() == "built\n"
    assert len(calls(fake, "-shared")) == 1
    assert not list(cache.glob("native/build-*"))


def test_a_library_serves_the_targets_it_holds(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvcc(tmp_path, FAKE, monkeypatch)
    hopper = build_cuda.build(HOPPER)
    both = build_cuda.build(HOPPER | AMPERE)
    assert both != hopper
    assert build_cuda.build(AMPERE) == both
    everything = build_cuda.build(ALL)
    assert build_cuda.build(frozenset({"sm_89"})) == everything
    assert len(calls(fake, "-shared")) == 3


@pytest.mark.parametrize("changed", ["cuda/down.cuh", "cuda/new.cu", "bindings_cuda.cpp", "arguments.h"])
def test_changed_sources_build_anew(changed: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path, FAKE, monkeypatch)
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    first = build_cuda.build(HOPPER)
    assert build_cuda.build(HOPPER) == first
    with (sources / changed).open("a") as file:
        file.write("// other\n")
    assert build_cuda.build(HOPPER) != first


def test_the_cpu_library_and_the_cuda_library_do_not_depend_on_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    before = build._sources_key()
    (sources / "bindings_cuda.cpp").write_text("// other")
    (sources / "cuda" / "kernels.h").write_text("// other")
    assert build._sources_key() == before


def test_another_nvcc_or_other_flags_build_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path, FAKE, monkeypatch)
    first = build_cuda.build(HOPPER)
    strict = build_cuda.build(HOPPER, build_cuda.WARNINGS_ARE_ERRORS)
    nvcc(tmp_path, FAKE.replace("V13.0.88", "V13.0.99"), monkeypatch)
    assert len({first, strict, build_cuda.build(HOPPER)}) == 3


# ---- without nvcc ------------------------------------------------------------------------------------------------------------


def test_a_machine_without_nvcc_uses_what_was_built_for_its_cards(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(tmp_path, FAKE, monkeypatch)
    built = build_cuda.build(HOPPER)
    no_nvcc(monkeypatch)
    assert build_cuda.build(HOPPER) == built
    with pytest.raises(build.BuildError, match="there is no nvcc: install the CUDA toolkit"):
        build_cuda.build(AMPERE)


def test_nvcc_is_looked_for_in_its_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NVCC", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        nvcc(tmp_path / folder, FAKE, monkeypatch)
    monkeypatch.delenv("NVCC")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    assert build_cuda._find_nvcc().command == (str(tmp_path / "path" / "nvcc"),)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build_cuda._find_nvcc().command == (str(tmp_path / "home" / "bin" / "nvcc"),)
    monkeypatch.setenv("CUDACXX", f"{tmp_path / 'path' / 'nvcc'} -ccbin g++")
    assert build_cuda._find_nvcc().command == (str(tmp_path / "path" / "nvcc"), "-ccbin", "g++")


def test_an_nvcc_whose_output_torchs_driver_may_not_run_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(tmp_path, FAKE, monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(build.BuildError, match=r"nvcc is of CUDA 13, but torch of CUDA 12\.8"):
        build_cuda.build(HOPPER)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    build_cuda.build(HOPPER)


def test_an_nvcc_that_is_no_command_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "nvcc 'x")
    with pytest.raises(build.BuildError, match=r"NVCC is \"nvcc 'x\".*no closing quotation"):
        build_cuda.build(HOPPER)


def test_a_failing_nvcc_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path, FAILS, monkeypatch)
    with pytest.raises(build.BuildError, match="no such thing as a warp") as caught:
        build_cuda.build(HOPPER)
    assert re.fullmatch(r"the compiler failed on [a-z0-9_/]+\.(cpp|cu)", caught.value.reason)
    assert not list(cache.glob("native/*/*.so"))
    with pytest.raises(UserError, match=r"(?s)could not be compiled: .*no such thing as a warp"):
        build.run(argparse.Namespace(device="cuda", arch="all"))


def test_command_builds_for_all_cards_where_there_is_none(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc(tmp_path, FAKE, monkeypatch)
    cards(monkeypatch)
    assert build.run(argparse.Namespace(device="cuda", arch=None)) == 0
    path, loaded = capsys.readouterr().out.splitlines()
    assert Path(path).parent.name.endswith("-all")
    assert loaded == "not loaded: torch finds no NVIDIA GPU here"
    with pytest.raises(UserError, match="torch finds no NVIDIA GPU here"):
        build.run(argparse.Namespace(device="cuda", arch="card"))
    with pytest.raises(UserError, match="--arch chooses among GPUs"):
        build.run(argparse.Namespace(device="cpu", arch="all"))


# ---- the sources themselves --------------------------------------------------------------------------------------------------

LOADED = """
import ctypes, sys
import torch
from sparse_backend.ffn import op
def registered():
    names = ("sparse_gated_ffn", "sparse_gate", "gated_activation")
    return [torch._C._dispatch_has_kernel_for_dispatch_key(f"prosparse::{name}", "CUDA") for name in names]
before = registered()
torch.ops.load_library(sys.argv[1])
print(before, registered(), ctypes.CDLL(sys.argv[1]).prosparse_cuda_max_rows(0, 0, 4096))
"""


@pytest.mark.skipif(isinstance(build_cuda._find_nvcc(), build.BuildError), reason="needs nvcc")
def test_sources_compile_for_all_cards_without_a_warning_and_load() -> None:
    """Whatever the machine: nothing of it needs a GPU."""
    library = build_cuda.build(ALL, build_cuda.WARNINGS_ARE_ERRORS)
    loaded = subprocess.run([sys.executable, "-c", LOADED, library], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("[False, False, False] [True, True, True] ")
    # No GPU, no rows.
    assert torch.cuda.is_available() or loaded.stdout.endswith(" 0\n")


@pytest.mark.skipif(isinstance(build_cuda._find_nvcc(), build.BuildError), reason="needs nvcc")
def test_every_card_and_shape_is_divided_into_blocks_that_fit(tmp_path: Path) -> None:
    nvcc = build_cuda._find_nvcc()
    assert isinstance(nvcc, build.Compiler)
    program, source = tmp_path / "cuda_plan", Path(__file__).with_name("cuda_plan.cu")
    strict = ("-std=c++20", "-O1", *build_cuda.WARNINGS_ARE_ERRORS)
    build.call([*nvcc.command, *strict, f"-I{build.SOURCES}", str(source), "-o", str(program)], source.name)
    checked = subprocess.run([program], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
