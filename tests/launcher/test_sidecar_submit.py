"""Annotations are checked before a run is queued, and what they hold is part of what the run is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import payloads
import pytest
from waiting import REPOSITORY

from launcher import submit
from launcher.board.read import read_runs
from launcher.compose import compose
from launcher.describe import facts, text
from launcher.folder import Attempt
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards import sidecar
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests

N, K = 256, 6


def annotate(
    folder: Path,
    data: Path | str,
    kind: str,
    rows: Any,
    groups: int | None = None,
    **provenance: Any,
) -> Path:
    """A sidecar about the shards in `data`, or about those of a manifest given as text."""
    manifest = data if isinstance(data, str) else manifests.load(data).hash
    sidecar.write(
        folder, np.asarray(rows), manifest=manifest, kind=kind, groups=groups,  # type: ignore[arg-type]
        provenance={"saw_labels": False} | provenance,
    )  # fmt: skip
    return folder


def groups_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, K, N).astype("i4")


@pytest.fixture
def notes(data: Path, tmp_path: Path) -> Path:
    root = tmp_path / "notes"
    annotate(root / "ids", data, "id", groups_of(), K)
    annotate(root / "others", "0" * 64, "id", groups_of(), K)
    annotate(root / "several", data, "multi_hot", np.eye(K, dtype="u1")[groups_of()], K)
    annotate(root / "boxes", data, "box", np.tile(np.int32([0, 0, 4, 4]), (N, 1)))
    annotate(root / "masks", data, "mask", np.zeros((N, 8, 8), "u1"), 3)
    annotate(root / "features", data, "dense", np.eye(N, dtype="f4")[:, :5] + 1)
    return root


def settings_of(settings: list[str], notes: Path, *more: str) -> list[str]:
    """The submission with `@name` for a sidecar in `notes`."""
    return [*settings, "guidance=sidecar", *(m.replace("@", f"{notes}/") for m in more)]


def send(settings: list[str]) -> dict[str, Any]:
    config = submit.resolve(settings)
    validate(config)
    return submit.submit(config)


BAD = [
    ("ids=@none groups=6", "guidance.ids: ", "holds no annotation"),
    ("ids=@others groups=6", "guidance.ids: ", "annotate these shards"),
    ("ids=@boxes groups=6", "kind box, not id or multi_hot", "give it as guidance.layout"),
    ("layout=@ids channels=6", "kind id, not box or mask", "give it as guidance.ids"),
    ("dense=@masks width=3", "kind mask, not dense", "tools.annotate features"),
    ("ids=@ids groups=7", "guidance.groups=7", "set guidance.groups=6"),
    ("ids=@several groups=5", "guidance.groups=5", "set guidance.groups=6"),
    ("layout=@boxes channels=2", "guidance.channels=2", "set guidance.channels=1"),
    ("layout=@masks channels=4", "guidance.channels=4", "set guidance.channels=3"),
    ("layout=@boxes channels=1 groups=1", "boxes have no groups", "guidance.ids=FOLDER"),
    ("dense=@features width=4", "guidance.width=4", "set guidance.width=5"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "names", "cure"), BAD, ids=[row[0] for row in BAD])
def test_annotations_that_do_not_fit_are_refused_before_anything_is_written(
    settings: list[str], notes: Path, runs: Path, fields: str, names: str, cure: str
) -> None:
    given = settings_of(settings, notes, *(f"guidance.{field}" for field in fields.split()))
    with pytest.raises(UserError) as raised:
        send(given)
    assert names in str(raised.value) and cure in str(raised.value)
    assert not runs.exists()


def test_several_groups_of_an_image_cannot_be_drawn_evenly(
    settings: list[str], notes: Path, runs: Path
) -> None:
    given = ["guidance.ids=@several", "guidance.groups=6", "evaluation.prior=uniform"]
    with pytest.raises(UserError, match=r"evaluation.prior=uniform.*empirical"):
        send(settings_of(settings, notes, *given))
    assert not runs.exists()


def test_a_damaged_sidecar_is_no_users_mistake(
    settings: list[str], notes: Path, runs: Path
) -> None:
    with (notes / "ids" / "rows.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(DamagedError, match="annotate again"):
        send(settings_of(settings, notes, "guidance.ids=@ids", "guidance.groups=6"))
    assert not runs.exists()


def test_the_command_ends_with_2_and_one_line(settings: list[str], notes: Path, runs: Path) -> None:
    given = settings_of(settings, notes, "guidance.ids=@others", "guidance.groups=6")
    done = subprocess.run(
        [sys.executable, "-m", "launcher.submit", *given],
        check=False, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: guidance.ids: ") and done.stderr.count("\n") == 1
    assert not runs.exists()


def test_what_annotations_hold_names_the_run_and_not_where_they_lie(
    payload: Callable[..., None],
    settings: list[str],
    notes: Path,
    runs: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload(train=payloads.nap)
    given = settings_of(settings, notes, "guidance.ids=@ids", "guidance.groups=6")
    monkeypatch.chdir(notes)
    first = send([*given, "guidance.ids=ids"])
    run = RunFolder(Path(first["folder"]))
    told = run.describe()["identity"]["guidance"]
    assert told["ids"] == sidecar.read(notes / "ids").sha256 and told["saw_labels"] is False
    shutil.copytree(notes / "ids", tmp_path / "elsewhere")
    moved = send([*given, f"guidance.ids={tmp_path / 'elsewhere'}"])
    assert (moved["run"], moved["state"]) == (first["run"], "running")
    monkeypatch.chdir(tmp_path)
    assert send([*given, "guidance.ids=elsewhere"])["run"] == first["run"]
    config = read_config(Attempt(run.attempt(1)).config)
    assert config.guidance.ids == str(notes / "ids")  # type: ignore[union-attr]
    annotate(tmp_path / "new", data, "id", groups_of(1), K)
    with pytest.raises(UserError, match=r"guidance.ids was .* and is"):
        send([*given, f"guidance.ids={tmp_path / 'new'}", f"name={first['run']}"])
    annotate(tmp_path / "seen", data, "id", groups_of(), K, saw_labels=True)
    labelled = send([*given, f"guidance.ids={tmp_path / 'seen'}"])
    assert labelled["run"] != first["run"]
    free = {each.id: each.label_free for each in read_runs(runs)[0]}
    assert free == {first["run"]: True, labelled["run"]: False}


def test_a_dry_run_names_annotations_and_reads_none_of_them() -> None:
    config = compose(
        ["experiment=digits_kmeans", "cluster=local", "guidance.ids=nowhere", "dry_run=true"]
    )
    assert facts(config)["annotations"] == {"ids": "nowhere"}
    assert "nowhere (not checked)" in text(config)
    assert facts(compose(["experiment=digits_dit", "cluster=local"]))["annotations"] == {}


def test_submission_needs_no_torch_for_them(settings: list[str], notes: Path, runs: Path) -> None:
    given = settings_of(settings, notes, "guidance.ids=@ids", "guidance.groups=7")
    code = (
        "import sys; from launcher import submit\n"
        "try: submit.submit(submit.resolve(sys.argv[1:]))\n"
        "except ValueError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *given],
        check=True, cwd=REPOSITORY, capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert "set guidance.groups=6" in done.stdout and done.stdout.endswith("False\n")
