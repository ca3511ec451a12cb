"""The one command: its table, its exit codes, what it imports, and its completion."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import REPOSITORY

from launcher import __main__ as command
from selfguide.spec.run import write_record
from shards.errors import UserError


def ask(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the console script answers."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def complete(line: str) -> set[str]:
    """What a shell gets that asks for the words at the end of a line."""
    program = f'"{sys.executable}" -m launcher 8>&1 >/dev/null 2>/dev/null'
    done = subprocess.run(
        ["bash", "-c", program],
        env={
            **os.environ, "PYTHONPATH": str(REPOSITORY), "_ARGCOMPLETE": "1", "IFS": "\013",
            "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
        },
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    return {word.strip() for word in done.stdout.split("\013")} - {""}


def test_every_command_of_the_table_has_a_main_that_takes_words() -> None:
    for name, module in command.modules().items():
        assert callable(importlib.import_module(module).main), name


def test_help_and_no_word_show_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == command.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in command.modules())


def test_misspelt_command_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'submit'"):
        command.main(["sumbit"])
    assert ask("sumbit").returncode == 2


def test_command_is_called_with_its_words_and_its_code(tmp_path: Path) -> None:
    done = ask("runs", "--runs", str(tmp_path), "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert ask("status", "nothing", "--runs", str(tmp_path)).returncode == 2
    assert ask("runs", "--nonsense").returncode == 2


def test_help_of_a_command_names_it_as_it_was_called() -> None:
    assert "usage: selfguide cancel" in ask("cancel", "--help").stdout


def test_no_page_of_help_imports_torch_or_hydra() -> None:
    program = (
        "import sys, contextlib, io\n"
        "from launcher import __main__ as command\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    command.main(['--help'])\n"
        "    assert not {'argparse', 'yaml'} & set(sys.modules), 'the table needs no command'\n"
        "    for name in command.modules():\n"
        "        with contextlib.suppress(SystemExit): command.main([name, '--help'])\n"
        "sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_shell_completes_commands_flags_and_settings() -> None:
    assert complete("selfguide s") >= {"submit", "status"}
    assert complete("selfguide status --fol") == {"--follow"}
    assert complete("selfguide shards ver") == {"verify"}
    assert complete("selfguide submit -m cluster.restart=s") == {"cluster.restart=successor"}
    assert "experiment=digits_dit" in complete("selfguide submit experiment=")
    assert complete("selfguide nothing ") == set()


def test_shell_completes_ids_of_runs_and_sweeps(tmp_path: Path) -> None:
    for id in ("3f2a91c05d77", "3f2b"):
        write_record(tmp_path / "digits_dit" / id / "run.json", {"id": id})
    write_record(tmp_path / ".sweeps" / "sweep-1" / "sweep.json", {"runs": []})
    assert complete(f"selfguide cancel --runs {tmp_path} 3f2") == {"3f2a91c05d77", "3f2b"}
    assert complete(f"selfguide resume --runs {tmp_path} 3f2a91c05d77 seed") == {"seed="}
    assert "sweep-1" in complete(f"selfguide runs --runs {tmp_path} sw")
