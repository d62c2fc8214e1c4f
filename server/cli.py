"""The command ``prosparse``: a table of commands, each in a module that is imported only when it is called."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, cast

from sparse_backend.errors import UserError


class CommandModule(Protocol):
    """What a module named in ``COMMANDS`` offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's flags."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do the work; returns the exit status."""


@dataclass(frozen=True)
class Command:
    """One row of the table."""

    module: str
    summary: str
    vllm_flags: bool = False
    """What follows ``--`` is handed over as ``arguments.vllm_flags``."""


COMMANDS = {
    "serve": Command("server.serve", "serve a checkpoint over the OpenAI protocol", vllm_flags=True),
    "inspect": Command("sparse_backend.inspect", "show what a checkpoint folder says of itself"),
    "pretrain": Command("sparse_backend.prosparse.pretrain", "train a small dense model from text"),
    "sparsify": Command("sparse_backend.prosparse.job", "turn a dense model into a ProSparse checkpoint"),
    "controls": Command("sparse_backend.prosparse.controls", "train the paper's control runs beside ProSparse"),
    "eval": Command("sparse_backend.prosparse.harness", "evaluate a running server with lm-evaluation-harness"),
    "build": Command("sparse_backend.ffn.build", "compile the native kernels for this machine"),
    "paths": Command("sparse_backend.bench.paths", "show up to how many rows the sparse path wins on this machine"),
    "bench ffn": Command("sparse_backend.bench.ffn", "time one feed-forward layer, sparse against dense"),
    "bench decode": Command("sparse_backend.bench.decode", "time decoding through vLLM, sparse against dense"),
    "bench batching": Command(
        "sparse_backend.bench.batching", "replay traffic against servers, policy by policy", vllm_flags=True
    ),
    "bench parity": Command("sparse_backend.bench.parity", "compare the tokens and counters of both paths"),
}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a ``UserError`` that names the nearest thing we know."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message}. See `{self.prog} --help`.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 the command failed, 2 the user's input cannot be used."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"prosparse: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output went away (`prosparse inspect … | head`). What is still buffered goes nowhere, or Python would
        # complain about the same pipe once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, rest = _split_command(argv)
    command = COMMANDS[name]
    own, vllm_flags = _split_at_dashes(rest)
    if vllm_flags and not command.vllm_flags:
        raise UserError(f"`prosparse {name}` takes nothing after `--`, got {' '.join(vllm_flags)}.")
    module = cast(CommandModule, importlib.import_module(command.module))
    parser = Parser(
        prog=f"prosparse {name}", description=f"{command.summary[0].upper()}{command.summary[1:]}.", allow_abbrev=False
    )
    module.add_arguments(parser)
    arguments, unknown = parser.parse_known_args(own)
    if unknown:
        raise UserError(_describe_unknown(parser, name, unknown))
    if command.vllm_flags:
        arguments.vllm_flags = vllm_flags
    # Imported here since settings.py needs `nearest`; called after `--help` was answered, which must always be possible.
    from server.settings import check_environment

    check_environment()
    return module.run(arguments)


def _split_command(argv: list[str]) -> tuple[str, list[str]]:
    for words in (2, 1):
        if (name := " ".join(argv[:words])) in COMMANDS:
            return name, argv[words:]
    given = " ".join(argv[:2]) if any(name.startswith(f"{argv[0]} ") for name in COMMANDS) else argv[0]
    raise UserError(f"unknown command {given!r}{nearest(given, COMMANDS)}. Known are: {', '.join(COMMANDS)}.")


def _split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    cut = words.index("--")
    return words[:cut], words[cut + 1 :]


def _describe_unknown(parser: argparse.ArgumentParser, name: str, unknown: list[str]) -> str:
    word = unknown[0]
    if not word.startswith("-"):
        return f"unexpected argument {word!r}. See `prosparse {name} --help`."
    flag = word.split("=", 1)[0]
    known = [option for action in parser._actions for option in action.option_strings]
    advice = " Flags of vLLM's own engine go after `--`." if COMMANDS[name].vllm_flags else ""
    return f"unknown flag {flag}{nearest(flag, known)}.{advice} See `prosparse {name} --help`."


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean X?"`` for a near miss, else nothing: ready to be put into an error text."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: prosparse COMMAND [ARGUMENTS]", "", *rows, "", "`prosparse COMMAND --help` shows a command's flags."]
    )


if __name__ == "__main__":
    sys.exit(main())
