import subprocess
import sys
from pathlib import Path

import pytest

from server import cli
from sparse_backend.errors import UserError


def test_user_errors_become_one_paragraph_and_status_2(capsys, monkeypatch):
    def fail(argv):
        raise UserError("the thing is broken. Mend it.")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "prosparse: error: the thing is broken. Mend it.\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["serv"], "unknown command 'serv' (did you mean serve?)"),
        (["bench", "fnn"], "unknown command 'bench fnn' (did you mean bench ffn?)"),
        (["serve", "folder", "--prot", "1"], "unknown flag --prot (did you mean --port?)"),
        (["serve", "folder", "--prot=1"], "unknown flag --prot (did you mean --port?)"),
        (["serve", "folder", "--max-num-seqs", "4"], "Flags of vLLM's own engine go after `--`"),
        (["serve", "folder", "other"], "unexpected argument 'other'"),
        (["serve", "folder", "--port"], "argument --port: expected one argument"),
        # An abbreviation could mean another flag in the next release.
        (["serve", "folder", "--drain", "3"], "unknown flag --drain (did you mean --drain-timeout?)"),
        (["inspect", "folder", "--", "--max-num-seqs", "4"], "takes nothing after `--`"),
    ],
)
def test_mistakes_are_named_with_the_nearest_match(argv, expected, capsys):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["serve", "folder"], ["inspect", "folder"]])
def test_an_environment_key_that_is_no_setting_is_refused_for_any_command(argv, capsys, monkeypatch):
    monkeypatch.setenv("PROSPARSE_CACHE_DRI", "x")
    assert cli.main(argv) == 2
    assert "PROSPARSE_CACHE_DRI, which is no setting (did you mean PROSPARSE_CACHE_DIR?)" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "status"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_overview_lists_every_command(argv, status, capsys):
    assert cli.main(argv) == status
    text = "".join(capsys.readouterr())
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS.values(), ids=cli.COMMANDS.keys())
def test_every_command_has_a_module(command):
    # Looked for, not imported: some of them import torch.
    root = Path(cli.__file__).parents[1]
    assert (root / command.module.replace(".", "/")).with_suffix(".py").is_file()


def test_nearest_says_nothing_of_far_words():
    assert cli.nearest("--zzz", ["--port"]) == ""


def test_a_reader_that_goes_away_gets_no_traceback():
    prosparse = f"{sys.executable} -c 'from server.cli import main; raise SystemExit(main())'"
    command = f"{prosparse} inspect deploy/demo --json | head -c 10"
    ran = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert (ran.stdout, ran.stderr) == ('{\n  "folde', "")
