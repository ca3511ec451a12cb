"""tools.correlate: points of runs, their rank correlation by hand, and rows of others with their sources."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launcher.board.read import read_runs
from shards import sidecar
from shards.errors import UserError
from tests.board.fakes import add_record, make_run
from tools.correlate import Point, correlation, facts, main

# fd_digits and NMI of runs, with a tie in each
SCORES = [(5.0, 0.2), (3.0, 0.5), (9.0, 0.1), (3.0, 0.9), (2.0, 0.5), (7.0, 0.4)]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for seed, (fd, nmi) in enumerate(SCORES):
        run = make_run(root, seed=seed)
        add_record(run, 128_000, {"fd_digits": 99.0, "nmi": 0.0})
        add_record(run, 256_000, {"fd_digits": fd, "nmi": nmi})
    # one without the second score is no point
    add_record(make_run(root, seed=9), 256_000, {"fd_digits": 1.0})
    return root


def ranks(values: list[float]) -> np.ndarray:
    """Of equals the mean of theirs."""
    return np.array(
        [
            sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2
            for x in values
        ]
    )  # fmt: skip


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_rank_correlation_of_runs_is_that_of_their_ranks(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "drawn" / "figure.png"
    said = asked(capsys, "fd_digits", "nmi", "--runs", str(runs), "--figure", str(figure))
    a, b = (ranks([row[i] for row in SCORES]) for i in (0, 1))
    by_hand = ((a - a.mean()) * (b - b.mean())).sum() / np.sqrt(
        ((a - a.mean()) ** 2).sum() * ((b - b.mean()) ** 2).sum()
    )
    assert said["rho"]["nmi"] == pytest.approx(by_hand) and by_hand < 0
    # each run once, at its last snapshot
    found = sorted((p["values"]["fd_digits"], p["values"]["nmi"]) for p in said["runs"])
    assert found == sorted(SCORES)
    assert {point["images"] for point in said["runs"]} == {256_000}
    assert Image.open(figure).width > 300


def test_a_mark_is_a_line_down_the_whole_picture(runs: Path, tmp_path: Path) -> None:
    drawn = []
    for name, mark in (("plain", ()), ("marked", ("--mark", "4"))):
        figure = tmp_path / f"{name}.png"
        words = ["fd_digits", "nmi", "--runs", str(runs), "--figure", str(figure)]
        assert main([*words, *mark]) == 0
        drawn.append(np.asarray(Image.open(figure).convert("L")).astype(int))
    changed = np.abs(drawn[1] - drawn[0]) > 64
    columns = np.flatnonzero(changed.any(0))
    assert 0 < len(columns) < 8 and columns.max() - columns.min() < 8
    assert np.ptp(np.flatnonzero(changed.any(1))) > 0.5 * changed.shape[0]


@pytest.mark.parametrize(("map", "wanted"), [(np.exp, 1.0), (lambda x: -(x**3), -1.0)])
def test_the_correlation_is_one_under_any_map_that_keeps_the_order(map: Any, wanted: float) -> None:
    points = [Point(str(x), {"fdd": x, "fid_adm": float(map(x))}) for x in (0.1, 3.0, 1.5, 2.0)]
    assert correlation(points, "fdd", "fid_adm") == pytest.approx(wanted)


def test_scores_that_were_measured_in_two_ways_are_refused_until_one_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (fd, nmi) in enumerate(SCORES):
        run = make_run(runs, "digits_other", seed=seed)
        # more samples
        add_record(run, 256_000, {"fd_digits": fd, "nmi": nmi}, protocol={"samples": 9000})
    with pytest.raises(UserError, match="2 ways"):
        main(["fd_digits", "nmi", "--runs", str(runs)])
    found = read_runs(runs)[0]
    keys = {r.protocol["samples"]: r.protocol_key for run in found for r in run.records}
    words = ["fd_digits", "nmi", "--runs", str(runs), "--protocol", keys[9000][:6]]
    assert len(asked(capsys, *words)["runs"]) == len(SCORES)


def test_runs_that_were_sampled_otherwise_compare(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(runs, "digits_other")
    add_record(run, 256_000, {"fd_digits": 4.0, "nmi": 0.3}, protocol={"g": 2.0})
    words = ("fd_digits", "nmi", "--runs", str(runs))
    assert len(asked(capsys, *words)["runs"]) == len(SCORES) + 1
    # but not one snapshot under two guidance weights
    add_record(run, 256_000, {"fd_digits": 5.0, "nmi": 0.3}, protocol={"g": 1.0})
    with pytest.raises(UserError, match="--protocol"):
        main([*words])


def test_groups_and_their_utilisation_are_those_of_the_run_s_sidecar(
    runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "groups"
    report = {"utilisation": 0.75, "nmi": 0.4, "inertia": 3.0}
    about = {"saw_labels": False, "report": report}
    rows = np.zeros(5, dtype=np.int32)
    sidecar.write(folder, rows, manifest="c0ffee", kind="id", groups=4, provenance=about)
    run = read_runs(runs)[0][0]
    guided = {**run.identity, "guidance": {"source": "sidecar", "groups": 4}}
    config = SimpleNamespace(guidance=SimpleNamespace(folders={"ids": str(folder)}))
    wanted = {"groups": 4.0, "utilisation": 0.75, "nmi": 0.4}
    assert facts(replace(run, identity=guided, config=config)) == wanted  # type: ignore[arg-type]
    # of TEMI's groups by how many are in use
    about = {"saw_labels": False, "method": "temi", "used": 3}
    sidecar.write(tmp_path / "temi", rows, manifest="c0ffee", kind="id", groups=4, provenance=about)
    temi = SimpleNamespace(guidance=SimpleNamespace(folders={"ids": str(tmp_path / "temi")}))
    wanted = {"groups": 4.0, "utilisation": 0.75}
    assert facts(replace(run, identity=guided, config=temi)) == wanted  # type: ignore[arg-type]
    gone = SimpleNamespace(guidance=SimpleNamespace(folders={"ids": str(tmp_path / "gone")}))
    assert facts(replace(run, identity=guided, config=gone)) == {"groups": 4.0}  # type: ignore[arg-type]
    assert facts(run) == {}


def test_rows_of_others_are_shown_and_no_part_of_the_correlation(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("fd_digits", "nmi", "--runs", str(runs))
    alone = asked(capsys, *words)["rho"]
    file = tmp_path / "others.yaml"
    file.write_text(
        "- {name: theirs, source: 'Somebody 2020, table 1', scores: {fd_digits: 99, nmi: 1}}\n"
    )
    said = asked(capsys, *words, "--literature", str(file), "--figure", str(tmp_path / "a.png"))
    assert said["rho"] == alone
    assert said["literature"][0]["source"] == "Somebody 2020, table 1"
    assert main([*words, "--literature", str(file)]) == 0
    assert "Somebody 2020" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "- {name: theirs, scores: {nmi: 1}}",
        "- {name: theirs, source: '', scores: {nmi: 1}}",
        "- {name: theirs, source: here, scores: {nim: 1}}",
        "- {name: theirs, source: here}",
        "theirs",
        "[",
    ],
)
def test_a_row_without_source_or_of_an_unknown_score_is_refused(
    text: str, runs: Path, tmp_path: Path
) -> None:
    file = tmp_path / "others.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        main(["fd_digits", "nmi", "--runs", str(runs), "--literature", str(file)])


def test_too_few_runs_or_one_value_have_no_correlation(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 3"):
        main(["fd_digits", "fid_adm", "--runs", str(runs)])
    with pytest.raises(UserError, match="nmj"):
        main(["fd_digits", "nmj", "--runs", str(runs)])
    same = [Point("", {"fdd": 1.0, "fid_adm": float(x)}) for x in range(4)]
    with pytest.raises(UserError, match="nothing is ordered"):
        correlation(same, "fdd", "fid_adm")
