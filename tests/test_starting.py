"""How commands begin: what Ctrl-C does while they import their modules, and that help imports few of them."""

import fcntl
import json
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


# of whose help some is read from what they measure with
IMPORT_TORCH = {
    *(
        "tools.atlas",
        "tools.bench",
        "tools.better",
        "tools.compare",
        "tools.confidence",
        "tools.digitnet",
    ),
    *(
        "tools.guide",
        "tools.neighbours",
        "tools.probe",
        "tools.same",
        "tools.spacing",
        "tools.toy",
    ),
}
COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("launcher", "slurm", "tools")
    for path in sorted((ROOT / package).rglob("*.py"))
    if "cli.run(" in path.read_text()
]
HEAVY = ("torch", "torchvision", "deepspeed", "timm", "sklearn", "hydra")


def _heavy(module: str, *words: str) -> tuple[int, list[str]]:
    """The exit code of a command, and which of HEAVY it imported."""
    code = (
        "import atexit, json, runpy, sys\n"
        f"sys.argv = ['-m', *{list(words)!r}]\n"
        f"atexit.register(lambda: print(json.dumps([m for m in {HEAVY!r} if m in sys.modules])))\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", [each for each in COMMANDS if each not in IMPORT_TORCH])
def test_help_of_a_command_imports_no_torch(module: str) -> None:
    assert _heavy(module, "--help") == (0, [])


@pytest.mark.parametrize(
    "command",
    [
        "tools.sample nothing --count 0",
        "tools.sample nothing --world 2",
        "tools.sample nothing --what x0",
        "tools.sample nothing --beside",
        "tools.sample nothing --dtype fp16",
        "tools.score nothing --protocol fid",
        "tools.score nothing --protocol fid_clean",
        "tools.vae --factor 2",
        "tools.vae nothing --out weights.pt",
        "tools.vae nothing --out weights.safetensors --rate 0",
        "tools.annotate kmeen nothing",
        "tools.checkpoint",
        "tools.reference makes",
    ],
)
def test_a_mistake_in_the_words_of_a_command_imports_no_torch(command: str) -> None:
    assert _heavy(*command.split()) == (2, [])


# of what each takes a second or more to import, and few jobs need
OF_FEW = ("torchvision", "timm", "sklearn", "torchdiffeq", "faiss", "matplotlib", "scipy.stats")


@pytest.mark.parametrize("module", ["selfguide.training.job", "selfguide.evaluation.job"])
def test_a_job_imports_no_library_that_only_few_need(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps([m for m in {OF_FEW!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == [], done.stderr


@pytest.mark.parametrize("package", ["launcher", "tools", "slurm"])
def test_package_imported_by_a_thread_while_a_command_begins_is_imported(package: str) -> None:
    """As what a drill puts into a rank does: Python allows signal handlers in the main thread only."""
    code = (
        "import importlib, sys, threading; sys.argv = ['-m']; "
        f"thread = threading.Thread(target=importlib.import_module, args=({package!r},)); "
        f"thread.start(); thread.join(); assert hasattr(sys.modules.get({package!r}), '_ROOT')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
