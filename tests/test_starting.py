"""How commands begin: what Ctrl-C does while they import their modules."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = (
    "import sys; sys.argv[0] = '/bin/selfguide'; from launcher.__main__ import script; script()"
)
PAGE = 4096  # bytes, the least that a pipe holds


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["-m", "launcher.submit", "experiment=in1k_dit", "dry_run=true"], "shards.errors"),
        (["-m", "launcher", "runs"], "pathlib"),
        (["-m", "launcher", "runs"], "selfguide.spec.run"),
        (["-c", SCRIPT, "runs"], "pathlib"),
        (["-m", "slurm", "--help"], "pathlib"),
        (["-m", "tools.shards", "verify", "nothing"], "shards.errors"),
        (["-m", "tools.shards", "verify", "nothing"], "numpy"),
        (["-m", "tools.sample", "nothing"], "numpy"),
        (["-m", "tools.sample", "nothing"], "torch"),
    ],
)
def test_a_command_interrupted_while_it_imports_ends_with_130_and_no_traceback(
    command: list[str], module: str
) -> None:
    # Python writes what it has imported, and waits where nobody reads: a full pipe holds it in its imports
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stderr is not None
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, PAGE)
    seen = b""
    while not seen.endswith(f" {module}\n".encode()):
        byte = process.stderr.read(1)
        assert byte, seen.decode()
        seen += byte
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    said = [line for line in rest.decode().splitlines() if not line.startswith("import time:")]
    # Python ends by the signal itself where it came within `exec`; a shell says 130 of either
    assert process.returncode in (130, -signal.SIGINT), rest
    assert not [line for line in said[1:] if line != "interrupted"], said
