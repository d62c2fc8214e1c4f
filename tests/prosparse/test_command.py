import argparse
from pathlib import Path

import pytest
import torch

from sparse_backend.errors import UserError
from sparse_backend.prosparse.checkpoints import save_weights
from sparse_backend.prosparse.command import add_shared_arguments, building, runtime_from
from tests.prosparse.models import random_llama


@pytest.mark.parametrize(
    ("gpu", "under_torchrun", "flags", "compiles"),
    [
        (True, False, [], True),
        (True, False, ["--no-compile"], False),
        (True, True, [], False),
        (False, False, [], False),
        (False, False, ["--compile"], True),
    ],
)
def test_a_run_on_one_gpu_is_compiled_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, under_torchrun: bool, flags: list[str], compiles: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if under_torchrun:
        monkeypatch.setenv("LOCAL_RANK", "0")
    parser = argparse.ArgumentParser()
    add_shared_arguments(parser, corpus_required=False)
    assert runtime_from(parser.parse_args(flags)).compile is compiles


def test_folder_takes_its_name_when_the_block_succeeds(tmp_path: Path) -> None:
    with building(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "content"


def test_folder_without_weights_vanishes_when_the_block_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with building(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
            raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        fail()
    assert not list(tmp_path.iterdir())


def test_saved_weights_outlive_an_output_that_another_process_made(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def build() -> None:
        with building(out) as folder:
            save_weights(random_llama(), folder)
            out.mkdir()
            (out / "file").write_text("theirs")

    with pytest.raises(UserError, match=r"kept in '.*out\.partial'"):
        build()
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()
    assert [path.name for path in out.iterdir()] == ["file"]


def test_saved_weights_outlive_an_interrupt_which_names_them(tmp_path: Path) -> None:
    def interrupt() -> None:
        with building(tmp_path / "out") as folder:
            save_weights(random_llama(), folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupt()
    assert "out.partial" in caught.value.__notes__[0]
    assert (tmp_path / "out.partial" / "model.safetensors").is_file()


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama()

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"a part")
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(UserError, match="No space left"), building(tmp_path / "out") as folder:
        save_weights(model, folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a" * 250, "a" * 300])
def test_name_too_long_is_refused_before_the_block(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be created"), building(tmp_path / name):
        pytest.fail("the block ran")


def test_dangling_link_is_taken_for_an_existing_output(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("gone")
    with pytest.raises(UserError, match="exists already"), building(tmp_path / "out"):
        pytest.fail("the block ran")
