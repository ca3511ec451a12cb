"""Bad input of evaluations: each is refused with field, value and a cure, and what was finished is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from launcher import resume
from launcher.compose import compose
from selfguide.evaluation import images as drawing
from selfguide.evaluation import job
from selfguide.evaluation.features.net import load_feature_net
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.scores import read_reference, read_unconditional
from selfguide.snapshot import load
from selfguide.spec.config import Config, build
from selfguide.spec.files import plain
from selfguide.spec.lacks import lacks
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.records import EvaluationRecord, Protocol, record_key, records
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from selfguide.spec.weight_files import FOLDER
from shards import storage
from shards.errors import NoRoomError, UserError
from shards.format import manifest as manifests
from tests.selfguide.snapshots import write_snapshot
from tests.shards.disks import disk

NET = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    return {"net": NET, "weights": str(file), "sha256": storage.sha256(str(file))}


def run_at(root: Path, digits: Path, net: dict[str, str], *overrides: str) -> RunFolder:
    """A run with one snapshot, compared with the first 40 scans."""
    run = RunFolder(root / "digits_uncond" / "0123")
    manifest = manifests.load(digits)
    write_snapshot(
        run.snapshot(7), digits, "sampler.steps=1", "evaluation=fd_timm", "evaluation.samples=30",
        "evaluation.batch=10", "evaluation.reference_count=40", *(f"evaluation.{k}={v}" for k, v in net.items()),
        *overrides,
        data={"root": str(digits), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    return run


@pytest.fixture
def run(digits: Path, net: dict[str, str], tmp_path: Path) -> RunFolder:
    return run_at(tmp_path / "runs", digits, net)


def request(run: RunFolder, folder: Path, attempt: int = 1, **changes: Any) -> Path:
    """What a job is given, outside of the run's disk."""
    snapshot = storage.read_complete(run.snapshot(7), verify="sizes") or {}
    from selfguide.spec.files import read_config

    values = plain(read_config(run.snapshot(7) / "config.yaml"))
    values["evaluation"] |= changes
    config = build(Config, values)
    about = {
        "data": snapshot.get("data", {"manifest": "m"}),
        "guidance": snapshot.get("guidance", {}),
    }
    key = record_key(7, Protocol.of(config, about))
    file = folder / f"request-{attempt}.json"
    file.write_text(
        json.dumps(
            {
                "run": str(run.root),
                "images": 7,
                "key": key,
                "attempt": attempt,
                "config": plain(config),
            }
        )
    )
    return file


def only(run: RunFolder) -> EvaluationRecord:
    (found,) = records(run)
    return found


def test_truncated_snapshot_is_refused_with_a_command_that_publishes_it_again(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(run, tmp_path)
    weights = next(run.snapshot(7).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError) as error:
        job.main(asked, RankStatus())
    text = str(error.value)
    assert str(run.snapshot(7)) in text
    # what the message says is a command line that its parser takes, and that finds the run
    _, *words = text.split("`")[1].removeprefix("python -m ").split()
    sent: list[RunFolder] = []

    class Found(Exception):
        pass

    def found(name: str, runs: Path) -> RunFolder:
        from launcher.folder import find

        sent.append(find(name, runs))
        raise Found

    monkeypatch.setattr(resume, "find", found)
    with pytest.raises(Found):
        resume.main(words)
    assert sent[0].root.resolve() == run.root.resolve()
    assert list(records(run)) == []


def test_reference_of_another_protocol_names_the_file_and_both_definitions(
    run: RunFolder, net: dict[str, str], tmp_path: Path
) -> None:
    whole = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"])
    file = tmp_path / "other.npz"
    features = np.random.default_rng(0).standard_normal((900, whole.width))
    Reference.of(Moments.of(features), {"features": {**whole.about, "resize": "none"}}).save(file)
    with pytest.raises(UserError) as error:
        job.main(request(run, tmp_path, reference=str(file), reference_count=None), RankStatus())
    text = str(error.value)
    assert f"reference={file}" in text
    assert "resize=none" in text
    assert whole.about["resize"] in text
    assert "tools.reference make SHARDS --protocol P --out FILE.npz" in text


def test_reference_that_was_made_anew_since_the_submission_is_refused(
    run: RunFolder, net: dict[str, str], tmp_path: Path
) -> None:
    whole = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"])
    file = tmp_path / "val.npz"
    features = np.random.default_rng(0).standard_normal((900, whole.width))
    Reference.of(Moments.of(features), {"features": whole.about}).save(file)
    given = {"reference": str(file), "reference_count": None, "reference_sha256": "0" * 64}
    with pytest.raises(UserError, match="the protocol compares with 000000000000") as error:
        job.main(request(run, tmp_path, **given), RankStatus())
    assert storage.sha256(str(file))[:12] in str(error.value)
    assert f"launcher.evaluate RUN evaluation.reference={file}" in str(error.value)
    assert list(records(run)) == []


def test_samples_that_are_nan_are_named_and_leave_no_record(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = drawing.generate_each

    def broken(*args: Any, **more: Any) -> Any:
        for x, n in draw(*args, **more):
            x[2] = float("nan")
            yield x, n

    monkeypatch.setattr(drawing, "generate_each", broken)
    with pytest.raises(UserError, match="sample 2 "):
        job.main(request(run, tmp_path), RankStatus())
    assert list(records(run)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_of_digits_that_are_not_finite_are_named_and_leave_no_record(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run, manifest = RunFolder(tmp_path / "runs" / "digits_uncond" / "0123"), manifests.load(digits)
    write_snapshot(
        run.snapshot(7), digits, "sampler.steps=1", "evaluation=fd_digits", "evaluation.samples=30",
        "evaluation.batch=10",
        data={"root": str(digits), "header": manifest.header, "manifest": manifest.hash},
    )  # fmt: skip
    run.run_json.write_text(json.dumps({"id": "0123", "images": 7}))
    draw = job.generate

    def broken(*args: Any, **more: Any) -> Any:
        for x, n in draw(*args, **more):
            # of one block, a single pixel of the fourth sample
            x[3, 0, 0, 0] = value
            yield x, n

    monkeypatch.setattr(job, "generate", broken)
    with pytest.raises(UserError, match="sample 3 of this snapshot is NaN or infinite"):
        job.main(request(run, tmp_path), RankStatus())
    assert list(records(run)) == []


@pytest.mark.parametrize("protocol", ["fd_digits", "fd_effnet"])
@pytest.mark.parametrize("samples", [0, 1])
def test_fewer_samples_than_2_are_refused_with_a_number_that_works(
    protocol: str, samples: int
) -> None:
    words = ["experiment=digits_uncond", "cluster=local", f"evaluation={protocol}"]
    with pytest.raises(UserError) as error:
        validate(compose([*words, f"evaluation.samples={samples}"]))
    assert f"evaluation.samples={samples}" in str(error.value)
    least = str(error.value).partition("take ")[2].split()[0]
    if samples:
        validate(compose([*words, f"evaluation.samples={least}"]))


def test_wrong_weights_name_the_file_and_both_checksums(
    run: RunFolder, net: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        job.main(request(run, tmp_path, sha256="0" * 64), RankStatus())
    for part in (net["weights"], net["sha256"], "0" * 64):
        assert part in str(error.value)


def test_features_that_are_not_finite_name_the_net_and_the_image(net: dict[str, str]) -> None:
    class Overflows(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            rows = torch.zeros(len(x), 4)
            rows[1, 2] = torch.inf
            return rows, None

    whole = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"])
    broken = Overflows()
    broken.register_parameter("one", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(UserError) as error:
        replace(whole, net=broken, width=4).rows(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    for part in (NET, "image 1 of 3", net["sha256"][:12]):
        assert part in str(error.value)


@pytest.mark.parametrize("field", ["reference", "unconditional"])
def test_statistics_that_are_not_there_name_the_setting_and_what_makes_them(
    field: str, net: dict[str, str]
) -> None:
    whole = load_feature_net("fd_timm", net["weights"], net=NET, sha256=net["sha256"])
    read = {"reference": read_reference, "unconditional": read_unconditional}[field]
    with pytest.raises(UserError, match=rf"{field}=none\.npz.*tools\.reference"):
        read("none.npz", whole)


def test_a_try_whose_key_was_scored_meanwhile_leaves_neither_record_nor_files(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "scored", lambda *of: True)
    job.main(request(run, tmp_path), RankStatus())
    assert [path for path in run.evals.rglob("*") if path.is_file()] == []


def test_two_nets_of_one_name_have_two_keys_and_two_records(
    run: RunFolder, net: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        save_file(timm.create_model(NET).state_dict(), other)
    job.main(request(run, tmp_path), RankStatus())
    changes = {"weights": str(other), "sha256": storage.sha256(str(other))}
    job.main(request(run, tmp_path, **changes), RankStatus())
    one, two = records(run)
    assert one.protocol["net"] == two.protocol["net"] == NET
    assert one.protocol_key != two.protocol_key
    assert one.score != two.score


def test_full_disk_of_runs_is_told_and_the_next_try_goes_on_to_the_same_record(
    digits: Path, net: dict[str, str], tmp_path: Path
) -> None:
    whole = run_at(tmp_path / "whole", digits, net)
    job.main(request(whole, tmp_path), RankStatus())
    with disk(tmp_path / "runs", 64 << 20) as small:
        run = run_at(tmp_path / "runs", digits, net)
        asked = request(run, tmp_path)
        small.leave(0)
        with pytest.raises(NoRoomError) as error:
            job.main(asked, RankStatus())
        assert str(tmp_path / "runs") in str(error.value)
        assert "make room" in str(error.value)
        assert list(records(run)) == []
        small.resize(64 << 20)
        job.main(asked, RankStatus())
        assert only(run).scores == only(whole).scores


def test_read_only_runs_are_told(digits: Path, net: dict[str, str], tmp_path: Path) -> None:
    with disk(tmp_path / "runs", 64 << 20) as small:
        run = run_at(tmp_path / "runs", digits, net)
        asked = request(run, tmp_path)
        small.read_only()
        with pytest.raises(NoRoomError) as error:
            job.main(asked, RankStatus())
        assert str(tmp_path / "runs") in str(error.value)


def test_snapshot_whose_autoencoder_is_not_at_hand_waits_and_says_where_it_may_lie(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv(FOLDER, str(tmp_path / "weights"))
    monkeypatch.delenv("SELFGUIDE_SD_VAE", raising=False)
    config = compose(
        [
            "experiment=digits_uncond",
            "cluster=local",
            "evaluation=fd_effnet",
            "evaluation.decoder=nothing.safetensors",
        ]
    )
    found = [lack for lack in lacks(config, "sd_vae") if lack.what == "sd_vae weights"]
    assert len(found) == 1
    for part in ("nothing.safetensors", "evaluation.decoder=FILE", "SELFGUIDE_SD_VAE"):
        assert part in found[0].sentence


def test_job_that_is_killed_after_any_block_publishes_the_record_of_a_whole_one(
    digits: Path, net: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_at(tmp_path / "whole", digits, net, "evaluation.sets=2")
    job.main(request(whole, tmp_path), RankStatus())
    draw, alive = drawing._Samples.images, [0]

    def killed(self: Any, first: int) -> Any:
        if alive[0] <= 0:
            raise KeyboardInterrupt
        alive[0] -= 1
        return draw(self, first)

    monkeypatch.setattr(drawing._Samples, "images", killed)
    run = run_at(tmp_path / "killed", digits, net, "evaluation.sets=2")
    asked, rng = request(run, tmp_path), np.random.default_rng(0)
    deaths = 0
    for _ in range(20):
        alive[0] = int(rng.integers(0, 4))
        try:
            job.main(asked, RankStatus())
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths >= 2
    once, again = only(whole), only(run)
    assert (again.scores, again.key, again.nfe, again.files) == (
        once.scores,
        once.key,
        once.nfe,
        once.files,
    )
    pictures = [each.grid(where) for each, where in ((once, whole), (again, run))]
    assert pictures[0] is not None
    assert pictures[1] is not None
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_scores_in_blocks_of_any_size_agree_to_a_thousandth(run: RunFolder, tmp_path: Path) -> None:
    # so few samples are all bias, whose drift is looked at all the same
    found = {}
    for batch in (1, 7, 64):
        config = load(run.snapshot(7)).config
        values = plain(config)
        values["evaluation"] |= {"batch": batch, "samples": 28}
        changed = build(Config, values)
        snapshot = load(run.snapshot(7))
        work = drawing.Work(parts=tmp_path / f"{batch}", references=tmp_path / "known")
        protocol = Protocol.of(changed, {"data": snapshot.data, "guidance": snapshot.guidance})
        made = drawing.score_images(snapshot, changed, protocol, RankStatus(), work)
        assert made is not None
        found[batch] = made.scores["fd_timm"]
    for batch in (1, 7):
        assert found[batch] == pytest.approx(found[64], rel=1e-3)
