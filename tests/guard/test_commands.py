"""Every command that README, docs and Makefile name, or named before, answers `--help`."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
_COMMAND = re.compile(
    r"python3? -m ((?:launcher|tools|slurm)[.\w]*)((?: [a-z][a-z0-9-]*(?![\w=/.]))?)"
)
# modules whose first word is a verb; what follows another module's name is an argument
_VERBS = ("tools.shards", "tools.annotate", "tools.bench")


def found() -> list[str]:
    """Module, and verb where it has any, of every `python -m` command in the documents."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "Makefile"]
    commands = set()
    for path in texts:
        for module, verb in _COMMAND.findall(path.read_text()):
            commands.add(module + (verb if module in _VERBS else ""))
    return sorted(commands)


def _run(command: str, output: str) -> None:
    """What `python -m command --help` does, in a process that has torch already."""
    with Path(output).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        module, *words = command.split()
        sys.argv = [module, *words, "--help"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_every_command_of_the_documents_now_and_before_answers_help(tmp_path: Path) -> None:
    """Each in a fork of this process: an interpreter of its own would import torch thirty times."""
    import torch  # noqa: F401

    before = json.loads((FIXTURES / "commands.json").read_text())
    wanted = sorted({*before, *found()})
    assert len(wanted) > 20
    fork = multiprocessing.get_context("fork")
    bad = {}
    for number, command in enumerate(wanted):
        output = tmp_path / f"{number}.txt"
        child = fork.Process(target=_run, args=(command, str(output)))
        child.start()
        child.join()
        text = output.read_text()
        if child.exitcode or "usage" not in text.lower():
            bad[command] = text[-500:]
    assert not bad, json.dumps(bad, indent=1)
