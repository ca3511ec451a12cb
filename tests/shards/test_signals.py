"""What a signal's handler raises ends the process, wherever Python was when the signal came."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEGIN = """
import os, signal, sys, time, weakref
from shards import cli, parallel

class Thing:
    pass

class Last(Thing):
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))

def by_weakref():
    thing = Thing()
    watch = weakref.ref(thing, lambda _: os.kill(os.getpid(), int(sys.argv[1])))
    del thing

def by_del():
    Last()

def main():
    try:
        globals()[sys.argv[2]]()
        time.sleep(600)
    finally:
        print("put away")
"""

COMMAND = "cli.run(main)"
WORKER = "parallel._begin(abs); main()"


@pytest.mark.parametrize("place", ["by_weakref", "by_del"])
@pytest.mark.parametrize(
    ("end", "number", "code", "said"), [(COMMAND, 2, 130, "interrupted\n"), (WORKER, 15, 143, "")]
)
def test_signal_in_a_callback_that_cannot_raise_ends_the_process_in_order(
    end: str, number: int, code: int, said: str, place: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + end, str(number), place],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "put away\n", said)


def test_other_errors_in_such_a_callback_are_shown_as_ever() -> None:
    script = f"{BEGIN}{COMMAND}".replace("os.kill(os.getpid(), int(sys.argv[1]))", "1 / 0")
    script = script.replace("time.sleep(600)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", script, "2", "by_weakref"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "ZeroDivisionError" in done.stderr
