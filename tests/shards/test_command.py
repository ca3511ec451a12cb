"""`python -m tools.shards` as a user runs it: what it prints, its exit codes, what verify finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import shards
from shards import cli
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.verify import verify
from tests.shards.data import flip, names, write
from tools.shards.__main__ import main


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.shards", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_digits_are_the_scans_and_a_second_make_says_so(tmp_path: Path) -> None:
    out = str(tmp_path / "digits")
    first, second = (
        _run("make", "digits", "--out", out),
        _run("make", "digits", "--out", out, "--json"),
    )
    assert first.returncode == 0 and first.stdout.startswith("wrote 1,797 samples 1 x 8 x 8 uint8")
    assert second.returncode == 0 and json.loads(second.stdout)["written"] is False
    assert _run("make", "digits", "--out", out).stdout.startswith("already there, nothing written")

    found, scans = shards.read_all(out), load_digits()
    rows = np.array([int(k.removeprefix("digits-")) for k in found["key"]])
    assert np.array_equal(found["x"][:, 0], scans.images[rows]) and found["x"].dtype == np.uint8
    assert np.array_equal(found["y"], scans.target[rows])
    header = manifests.load(out).header
    assert (header["kind"], header["shift"], header["scale"]) == ("image", 8.0, 0.125)
    assert ((found["x"] - header["shift"]) * header["scale"]).min() == -1

    assert "all well" in _run("verify", out).stdout
    assert json.loads(_run("stats", out, "--json").stdout)["classes"] == 10
    assert "kind image, shift 8.0, scale 0.125" in _run("stats", out).stdout


def test_synthetic_latents_have_the_shape_asked_for_and_unit_variance_scaled(
    tmp_path: Path,
) -> None:
    out = str(tmp_path)
    done = _run(
        "make",
        "synthetic",
        "--out",
        out,
        "--count",
        "300",
        "--shape",
        "4",
        "8",
        "8",
        "--classes",
        "0",
    )
    assert done.returncode == 0, done.stderr
    found, manifest = shards.read_all(out), manifests.load(out)
    assert (
        found["x"].shape == (300, 4, 8, 8) and found["x"].dtype == np.float16 and "y" not in found
    )
    assert manifest.header["kind"] == "latent" and manifest.label_histogram is None
    assert np.std(found["x"].astype(float) * manifest.header["scale"]) == pytest.approx(1, abs=0.01)


def test_a_make_that_is_killed_leaves_no_data_set_and_the_next_one_finishes(tmp_path: Path) -> None:
    shape = ("--count", "16000", "--shape", "4", "8", "8", "--shard-mb", "0.2")  # 63 shards
    out, other = tmp_path / "killed", tmp_path / "whole"
    making = subprocess.Popen(
        [sys.executable, "-m", "tools.shards", "make", "synthetic", "--out", str(out), *shape]
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("shards/*.tar"))) < 3:
            assert making.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        making.kill()
        making.wait()
    with pytest.raises(UserError, match="no LATEST, which is written last"):
        manifests.load(out)
    for root in (out, other):
        assert _run("make", "synthetic", "--out", str(root), *shape).returncode == 0
    assert manifests.load(out).hash == manifests.load(other).hash
    assert verify(out).problems == ()


def test_a_command_whose_parent_ignores_sigchld_sees_that_a_program_failed() -> None:
    code = "import subprocess; from shards import cli; cli.run(lambda: subprocess.run(['false']).returncode)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0"}, "ünï"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, r"\xfcn\xef"),
        ({"PYTHONIOENCODING": "ascii"}, r"\xfcn\xef"),
        ({"LC_ALL": "C"}, "ünï"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ünï"),
    ],
)
def test_words_and_files_are_utf_8_in_every_locale(
    variables: dict[str, str], shown: str, tmp_path: Path
) -> None:
    path = tmp_path / "ünï"
    path.write_text("ünï", encoding="utf-8")
    code = "import sys; from pathlib import Path; from shards import cli; "
    code += "cli.run(lambda: print(Path(sys.argv[1]).read_text(), Path(sys.argv[1]).name))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"{shown} {shown}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stats", "{tmp}/none"), "no shards at {tmp}/none (no such folder): write them with"),
        (("verify", "{tmp}"), "no shards at {tmp} (the folder is empty)"),
        (("make", "synthetic", "--out", "{tmp}/a", "--count", "0"), "--count 0: give at least 1"),
        (("make", "synthetic", "--out", "{tmp}/a", "--shape", "1", "0", "1"), "--shape 1 0 1"),
        (("make", "digits", "--out", "{tmp}/a", "--shard-mb", "0"), "--shard-mb 0.0"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = _run(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message.format(tmp=tmp_path) in done.stderr
    assert names(tmp_path) == []


def test_help_shows_examples() -> None:
    done = _run("--help")
    assert (
        done.returncode == 0
        and "python -m tools.shards make digits --out data/digits" in done.stdout
    )


def test_verify_names_every_kind_of_damage(tmp_path: Path) -> None:
    manifest = write(tmp_path, 700)
    assert verify(tmp_path).problems == ()
    first, second = (tmp_path / s.name for s in manifest.shards)
    block = manifest.blocks[1]

    def problems() -> str:
        return "\n".join(verify(tmp_path).problems)

    at = int(block["offset"][manifest.column("y")])
    flip(first, at)
    assert "y of block 1 is damaged (ordinals 256 to 511)" in problems()
    flip(first, at)
    flip(first, 100)  # mode of the first member
    assert "the damage is in headers or padding" in problems()
    flip(first, 100)
    whole = second.read_bytes()
    second.write_bytes(whole[:5000])
    assert f"5,000 bytes, the manifest promises {len(whole):,}" in problems()
    assert "x of block 2 is damaged" in problems()
    second.unlink()
    assert f"{manifest.shards[1].name} is missing" in problems()
    second.write_bytes(whole)
    sidecar = second.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"count": 188', '"count": 187'))
    assert "disagrees with the manifest: count" in problems()
    sidecar.unlink()
    assert f"{sidecar.name} is missing" in problems()
    done = _run("verify", str(tmp_path))
    assert done.returncode == 1 and "damaged: " in done.stdout


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (None, 0), (7, 7)])
def test_exit_codes(raised: object, code: int) -> None:
    def main() -> int | None:
        if isinstance(raised, BaseException):
            raise raised
        return raised  # type: ignore[return-value]

    with pytest.raises(SystemExit) as left:
        cli.run(main)
    assert left.value.code == code


def test_a_place_that_cannot_be_is_named_and_other_errors_keep_their_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main(["make", "digits", "--out", str(tmp_path / "file" / "x")]))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/file/x") and said.endswith(": Not a directory\n")

    def broken() -> int:
        raise OSError("of nobody's file")

    with pytest.raises(OSError, match="of nobody's file"):
        cli.run(broken)


def test_a_reader_that_leaves_the_pipe_is_no_error(tmp_path: Path) -> None:
    code = "from shards import cli\ncli.run(lambda: print('x\\n' * 200_000))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None and writer.stderr is not None
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == "" and writer.wait(timeout=60) == 141


def test_track_gives_back_every_item() -> None:
    assert list(cli.track(range(5), 5, "counting")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_without_a_stream_ends_as_with_one(tmp_path: Path, closed: str) -> None:
    command = f"{sys.executable} -m tools.shards stats"
    for root, code in ((tmp_path / "none", 2), (tmp_path, 0)):
        if not code:
            main(["make", "digits", "--out", str(root)])
        done = subprocess.run(
            ["bash", "-c", f"{command} {root} {closed}"], check=False, capture_output=True
        )
        assert done.returncode == code
        assert b"Traceback" not in done.stderr and b"error" not in done.stdout


@pytest.mark.parametrize("module", ["tools.shards", "launcher.runs"])
def test_a_working_directory_that_was_removed_is_one_line(tmp_path: Path, module: str) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f"cd {gone} && rmdir {gone} && {sys.executable} -m {module} --help"
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        ["bash", "-c", line],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the working directory")
    assert done.stderr.count("\n") == 1
