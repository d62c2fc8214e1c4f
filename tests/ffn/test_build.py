import argparse
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparse_backend.errors import UserError
from sparse_backend.ffn import build
from tests.ffn.without_compiler import run_without_compiler

# Answers --version, notes what else it is asked, and writes each output file.
FAKE = """#!/bin/sh
[ "$1" = --version ] && { echo fake 1.0; exit 0; }
case "$*" in *-fsyntax-only*) exit 0;; esac
echo "$*" >> "$0.log"
while [ "$1" != -o ]; do shift; done
sleep 0.05
echo built > "$2"
"""
FAILS = """#!/bin/sh
[ "$1" = --version ] && { echo fake 2.0; exit 0; }
case "$*" in *-fsyntax-only*) exit 1;; esac
echo "error: no such thing as a tensor" >&2
exit 1
"""

CPU = argparse.Namespace(device="cpu", arch=None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / "compiler"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def links(compiler: Path) -> int:
    return sum("-shared" in line for line in (compiler.parent / "compiler.log").read_text().splitlines())


def test_processes_at_once_build_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = compiler(tmp_path, FAKE, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        built = {future.result() for future in [pool.submit(build.build) for _ in range(4)]}
    assert len(built) == 1
    assert built.pop().read_text() == "built\n"
    assert links(fake) == 1
    assert not list(cache.glob("native/build-*"))


def test_another_compiler_builds_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = compiler(tmp_path, FAKE, monkeypatch)
    first = build.build()
    assert build.build() == first
    compiler(tmp_path, FAKE.replace("fake 1.0", "fake 1.1"), monkeypatch)
    assert build.build() != first
    assert links(fake) == 2


def test_changed_sources_build_anew(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path, FAKE, monkeypatch)
    first = build.build()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "bindings.cpp").write_text("// other")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    assert build.build() != first


def test_a_machine_without_a_compiler_uses_what_was_built(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, FAKE, monkeypatch)
    built = build.build()
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert build.build() == built


def test_a_failing_compiler_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler(tmp_path, FAILS, monkeypatch)
    with pytest.raises(build.BuildError, match="no such thing as a tensor") as caught:
        build.build()
    # What ends up in a metric's label.
    assert re.fullmatch(r"the compiler failed on [a-z0-9_/]+\.cpp", caught.value.reason)
    assert not list(cache.glob("native/*/*.so"))
    assert not list(cache.glob("native/build-*"))
    with pytest.raises(UserError, match=r"(?s)could not be compiled: .*no such thing as a tensor"):
        build.run(CPU)


def test_no_compiler_says_what_to_do(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match=r"install g\+\+"):
        build.build()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROSPARSE_CACHE_DIR", str(tmp_path / "file"))
    compiler(tmp_path, FAKE, monkeypatch)
    with pytest.raises(build.BuildError, match=r"(?s)PROSPARSE_CACHE_DIR.*file"):
        build.build()


def test_a_compiler_that_is_no_command_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(build.BuildError, match=r"CXX is \"g\+\+ 'x\".*no closing quotation"):
        build.build()


def test_command_builds_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.run(CPU) == 0
    path, kernel = capsys.readouterr().out.splitlines()
    assert Path(path).is_file()
    assert kernel.startswith("kernel: cpu, instruction set in use: ")


BUILD = """
import argparse
from sparse_backend.errors import UserError
from sparse_backend.ffn import build
try:
    build.run(argparse.Namespace(device="cpu", arch=None))
except UserError as error:
    print(error)
"""


def test_command_says_once_that_there_is_no_compiler(cache: Path) -> None:
    done = run_without_compiler(BUILD, cache)
    assert (done.stdout + done.stderr).count("no C++ compiler") == 1


REFUSED = """
import torch
from sparse_backend.ffn import counters, sparse_gated_ffn
try:
    sparse_gated_ffn(torch.zeros(1, 12), torch.zeros(16, 12), torch.zeros(8, 12), 0.0, counters.new_counters(), 1)
except RuntimeError as error:
    print(error)
"""


def test_a_compiler_that_links_its_runtime_statically_gives_errors_and_no_crash(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "g++ -static-libstdc++ -static-libgcc")
    ran = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "d_model must be a positive multiple of 8" in ran.stdout
    assert list(cache.glob(f"native/*/{build.LIBRARY}"))
