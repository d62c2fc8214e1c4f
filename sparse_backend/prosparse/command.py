"""What the room's two commands share: flags, their effect on the process, and running as a module."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import torch
import transformers

from sparse_backend.errors import UserError
from sparse_backend.prosparse.trainer import Runtime


def add_shared_arguments(parser: argparse.ArgumentParser, corpus_required: bool = True) -> None:
    """Flags for the corpus, the device and the progress lines."""
    parser.add_argument(
        "--corpus",
        required=corpus_required,
        metavar="SOURCE",
        help="text to train on: 'stdlib' (this Python's standard library), a folder, a .jsonl or .parquet file (text and, "
        "optionally, path in each record) or a text file" + ("" if corpus_required else "; in place of the recipe's"),
    )
    parser.add_argument(
        "--corpus-name", metavar="NAME", help="what the manifest calls the corpus (default: made from SOURCE)"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU where there is one (default)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the model: half a minute to start, twice as fast after (default: on a GPU, without torchrun)",
    )
    parser.add_argument(
        "--progress-every", type=int, default=50, metavar="STEPS", help="steps between progress lines (50)"
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="steps between checkpoints from which a killed run goes on (0, the default: about every ten minutes)",
    )


def quieten_transformers() -> None:
    """No progress bars, and no warnings: they are about uses that do not occur here."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def runtime_from(args: argparse.Namespace, *, takes_all_gpus: bool = False) -> Runtime:
    """Resolve the device, and quieten transformers.

    Args:
        args: the parsed flags.
        takes_all_gpus: the command puts several GPUs to use by itself, without torchrun.

    Raises:
        UserError: a GPU is asked for and there is none, there are several, or the progress interval is not positive.
    """
    if args.progress_every < 1:
        raise UserError(f"--progress-every is {args.progress_every}: it must be at least 1.")
    if args.save_every < 0:
        raise UserError(f"--save-every is {args.save_every}: it must be 0 or more.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device is cuda, but torch finds no usable NVIDIA GPU here. Take --device cpu, or install a CUDA torch."
        )
    use_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if use_gpu and torch.cuda.device_count() > 1 and local_rank < 0 and not takes_all_gpus:
        # The Trainer would split every batch over all of them, through threads of this process.
        raise UserError(
            f"torch sees {torch.cuda.device_count()} GPUs and this process computes on one. Choose it, CUDA_VISIBLE_DEVICES=0,"
            f" or take all: torchrun --nproc-per-node {torch.cuda.device_count()} -m sparse_backend.prosparse.job …"
        )
    quieten_transformers()
    device = torch.device("cuda", max(0, local_rank)) if use_gpu else torch.device("cpu")
    compiles = use_gpu and local_rank < 0 if args.compile is None else args.compile
    return Runtime(device, compiles, args.progress_every, args.save_every)


def command_line(name: str) -> str:
    """This process' arguments as the ``prosparse`` command that does the same."""
    arguments = sys.argv[1:]
    return shlex.join(["prosparse", name, *(arguments[1:] if arguments[:1] == [name] else arguments)])


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name when the block succeeds.

    When the block fails the folder vanishes, unless weights were saved in it: hours of training are not thrown away for
    a disk that is full afterwards.

    Raises:
        UserError: ``out`` exists, its folder cannot be created, or it cannot be completed after the weights were saved.
    """
    try:
        if out.is_symlink() or out.exists():
            raise UserError(
                f"OUT {str(out)!r} exists already. Nothing is overwritten: name another folder, or delete this one first."
            )
        partial = out.with_name(out.name + ".partial")
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{str(partial)!r} exists: another run is writing OUT, or one was killed. Delete the folder if none is"
            " running."
        ) from None
    except OSError as error:
        raise UserError(f"OUT {str(out)!r} cannot be created: {error}.") from None
    try:
        yield partial
        partial.rename(out)
    except BaseException as error:
        if not any(partial.glob("*.safetensors")):
            rmtree(partial, ignore_errors=True)
            raise
        kept = f"The trained weights are kept in {str(partial)!r}."
        if isinstance(error, UserError | OSError):
            reason = str(error).removesuffix(".")
            raise UserError(f"OUT {str(out)!r} could not be completed: {reason}. {kept}") from None
        error.add_note(kept)
        raise


def main(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
) -> int:
    """Run one command by itself (``python -m``), for machines that have no ``prosparse`` on the path.

    Returns:
        The exit status: that of ``run``, or 2 after printing a ``UserError``.
    """
    parser = argparse.ArgumentParser(prog=f"prosparse {name}", description=description)
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except UserError as error:
        print(f"prosparse: error: {error}", file=sys.stderr)
        return 2
