"""What a shell hands down changes no result: signals, descriptors, umask, locale, variables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_SAY = """
import json, os, signal, subprocess, sys, tempfile, time
from tests import environment
environment.settle()
own = ("TMPDIR", "HOME", "PATH", "PYTHONPATH", "PWD", "OLDPWD", "SHLVL", "_", "http_proxy")
keep = {k: v for k, v in os.environ.items() if k not in own}
status = subprocess.run(["cat", "/proc/self/status"], stdout=subprocess.PIPE, text=True).stdout
facts = {"environment": keep, "home": "HOME" in os.environ, "zone": time.tzname}
facts["child"] = [line for line in status.splitlines() if line.startswith(("Umask", "SigBlk", "SigIgn"))]
facts["interrupted"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
facts["failed"] = subprocess.run(["false"]).returncode
facts["open"] = [os.fstat(n).st_mode > 0 for n in (0, 1, 2)]
facts["temporary"] = tempfile.gettempdir()
print(json.dumps(facts), file=open(sys.argv[1], "w"))
"""


def environment(variables: dict[str, str | None], folder: Path) -> dict[str, str]:
    """This process's, less what is None."""
    deep = folder.joinpath(*["as-deep-as-on-some-clusters"] * 5)
    deep.mkdir(parents=True, exist_ok=True)
    given = {**os.environ, **variables}
    return {k: str(deep) if v == DEEP else v for k, v in given.items() if v is not None}


def facts(path: Path, variables: dict[str, str | None], before: Callable[[], object]) -> object:
    """What tests find in a process that was started with these variables after `before`."""
    given = environment(variables, path.parent)
    command = [sys.executable, "-c", _SAY, str(path)]
    subprocess.run(command, env=given, cwd=ROOT, preexec_fn=before, check=True, timeout=60)
    return json.loads(path.read_text())


def ignore(*numbers: int) -> Callable[[], object]:
    return lambda: [signal.signal(number, signal.SIG_IGN) for number in numbers]


# stands for a folder of the test's own whose path is too long for a socket's
DEEP = "a deep folder"
HANDED_DOWN: dict[str, tuple[dict[str, str | None], Callable[[], object]]] = {
    "SIGINT ignored, as in the background": ({}, ignore(signal.SIGINT, signal.SIGQUIT)),
    "SIGHUP ignored, as by nohup": ({}, ignore(signal.SIGHUP)),
    "SIGCHLD ignored, and all children seem to succeed": ({}, ignore(signal.SIGCHLD)),
    "SIGTERM ignored": ({}, ignore(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)),
    "SIGINT blocked": ({}, lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})),
    "umask 077": ({}, lambda: os.umask(0o077)),
    "umask 000": ({}, lambda: os.umask(0)),
    "closed standard input": ({}, lambda: os.close(0)),
    "HOME unset": ({"HOME": None}, lambda: None),
    "another locale": ({"LC_ALL": "C", "LANG": "de_DE", "LANGUAGE": "de"}, lambda: None),
    "another time zone": ({"TZ": "Asia/Tokyo"}, lambda: None),
    "inside a Slurm job": (
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "9", "SBATCH_PARTITION": "x", "SQUEUE_FORMAT": "%i", "RANK": "3"},
        lambda: None,
    ),
    "a user's defaults for Slurm": (
        {"SQUEUE_STATES": "COMPLETED", "SCANCEL_INTERACTIVE": "true", "SLURM_CONF": "/nowhere"}, lambda: None,
    ),
    "a hook of git": ({"GIT_DIR": "/nowhere", "GIT_INDEX_FILE": "/nowhere/index"}, lambda: None),
    "a shell's and Python's settings": (
        {"CDPATH": "/", "BASH_ENV": "/nowhere", "PYTHONUNBUFFERED": "1", "PYTEST_ADDOPTS": "-x"}, lambda: None,
    ),
    "a proxy": ({"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}, lambda: None),
    "a temporary folder too deep for sockets": ({"TMPDIR": DEEP}, lambda: None),
    "credentials": ({"AWS_PROFILE": "other", "AWS_ENDPOINT_URL": "http://nowhere"}, lambda: None),
    "a terminal": ({"COLUMNS": "20", "FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm"}, lambda: None),
    "threads and devices": ({"OMP_NUM_THREADS": "64", "CUDA_VISIBLE_DEVICES": "0,1"}, lambda: None),
}  # fmt: skip


@pytest.mark.parametrize("setting", HANDED_DOWN)
def test_tests_find_the_same_environment_whatever_is_handed_down(
    setting: str, tmp_path: Path
) -> None:
    variables, before = HANDED_DOWN[setting]
    plain = facts(tmp_path / "plain.json", {}, lambda: None)
    assert facts(tmp_path / "other.json", variables, before) == plain


def test_the_suite_passes_in_a_shell_that_hands_down_everything_at_once(
    tmp_path: Path,
) -> None:
    """Of each kind of test a quick one: a command that is interrupted, a pool of workers, a store, a page."""
    variables: dict[str, str | None] = {}
    for given, _ in HANDED_DOWN.values():
        variables |= given

    def before() -> None:
        for _, each in HANDED_DOWN.values():
            each()
        os.umask(0o077)

    picked = [
        "tests/shards/test_resume.py::test_ctrl_c_ends_workers_and_leaves_no_temporary_file",
        "tests/launcher/test_array.py::test_ctrl_c_while_slurm_answers_ends_its_jobs_and_keeps_their_code",
        "tests/launcher/test_compose.py", "tests/shards/test_order.py", "tests/board/test_page.py",
    ]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *picked]
    done = subprocess.run(
        command,
        env=environment(variables, tmp_path),
        cwd=ROOT,
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


COMMAND = [
    "-m",
    "launcher.submit",
    "experiment=digits_dit",
    "cluster=local",
    "dry_run=true",
    "--json",
]


@pytest.mark.parametrize("setting", HANDED_DOWN)
def test_a_command_answers_the_same_whatever_is_handed_down(setting: str, tmp_path: Path) -> None:
    variables, before = HANDED_DOWN[setting]
    answers = [
        subprocess.run(
            [sys.executable, *COMMAND], env=environment(given, tmp_path), cwd=ROOT, preexec_fn=how,
            capture_output=True, text=True, timeout=60,
        )
        for given, how in (({}, None), (variables, before))
    ]  # fmt: skip
    plain, other = ((done.returncode, done.stdout, done.stderr) for done in answers)
    assert plain == other and plain[0] == 0
