"""`tools.checkpoint`: what it verifies, lists, exports and reconstructs is what a run had in memory."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from selfguide import snapshot
from selfguide.distributed import RankInfo
from selfguide.sampling.weak import other_snapshot
from selfguide.spec.averages import AverageSpec, gamma
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.posthoc import Profile, reconstruct
from selfguide.spec.retention import pin, pinned, unpin
from selfguide.spec.run import RunFolder, image_folder, write_record
from selfguide.spec.weak import WeakModel
from selfguide.training import checkpoint, publish, retention, store
from selfguide.training.ema import Averages
from selfguide.training.engine.layout import Layout
from selfguide.training.loop import advance
from selfguide.training.stored import open_checkpoint
from shards import storage
from shards.errors import DamagedError, NoRoomError, UserError
from tests.selfguide.test_loop import BATCH, SWITCH, begun, masters
from tests.shards.data import flip
from tests.shards.disks import disk
from tools.checkpoint import ema
from tools.checkpoint import pin as pin_command
from tools.checkpoint.__main__ import main

WIDTHS, STEPS = (0.05, 0.1), 16


@dataclass
class Kept:
    """A run with a snapshot of every step and three checkpoints, and its weights after every step."""

    root: Path
    weights: list[Tensor]
    averages: list[Tensor]
    names: tuple[str, ...]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    root, single = tmp_path_factory.mktemp("kept") / "run", RankInfo(0, 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        job = begun(root, 0)
        train = replace(job.config.train, ema_halflife=(500,), ema_width=WIDTHS)
        job.config = replace(job.config, train=train)
        specs = [AverageSpec(halflife=500), *(AverageSpec(width=width) for width in WIDTHS)]
        job.state.averages = Averages(job.state.engine, specs, 0.05)
        run, weights = job.lease.run, []
        run.attempt(1).mkdir(parents=True)
        write_record(run.run_json, {"images": 1024})
        for _ in range(STEPS):
            advance(job)
            weights.append(masters(job).clone())
            images = job.state.images
            publish.publish(run.snapshot(images), job.state, job.config, {}, single, job.lease)
            if images in (512, 960, 1024):
                checkpoint.save(run.checkpoint(images), job.state, single, job.lease)
        engine = job.state.engine
        averages = [engine.gather(shard).clone() for shard in job.state.averages.shards]
    return Kept(root, weights, averages, engine.layout.names)


@pytest.fixture
def run(kept: Kept, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept.root, tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Exit code and JSON of the command."""
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_verify_with_a_flipped_bit_names_the_file_and_exits_1(run: Path, capsys: Any) -> None:
    code, found = said(capsys, "verify", str(run))
    assert code == 0 and found["well"]
    assert [each["state"] for each in found["checkpoints"]] == ["whole"] * 3
    flip(run / "checkpoints" / image_folder(960) / checkpoint.REPLICATED, 3000)
    (run / "checkpoints" / image_folder(2048)).mkdir()
    (run / "checkpoints" / image_folder(512) / "MANIFEST.json").write_text("{")
    code, found = said(capsys, "verify", str(run))
    states = {each["checkpoint"]: each for each in found["checkpoints"]}
    assert code == 1 and not found["well"]
    assert states[image_folder(960)]["damaged"][0][0] == checkpoint.REPLICATED
    assert states[image_folder(512)]["damaged"][0][0] == "MANIFEST.json"
    assert states[image_folder(1024)]["state"] == "whole"
    assert states[image_folder(2048)]["state"] == "unfinished"
    code, _ = said(capsys, "verify", str(run / "checkpoints" / image_folder(1024)))
    assert code == 0


@pytest.mark.parametrize("verb", ["show", "export"])
def test_what_is_published_and_no_checkpoint_is_refused(
    run: Path, verb: str, tmp_path: Path
) -> None:
    snapshot_of = run / "snapshots" / image_folder(1024)
    words = ["--out", str(tmp_path / "out")] if verb == "export" else []
    with pytest.raises(UserError, match=f"{snapshot_of} is no .*checkpoint"):
        main([verb, str(snapshot_of), *words])


def test_show_lists_what_manifests_say_and_pins(run: Path, capsys: Any) -> None:
    code, pins = said(capsys, "pin", str(run), "--images", "512")
    assert code == 0 and pins == {"pinned": [image_folder(512)]}
    _, found = said(capsys, "show", str(run))
    rows = found["checkpoints"]
    assert [row["images"] for row in rows] == [512, 960, 1024]
    assert [row["pinned"] for row in rows] == [True, False, False]
    assert {(row["ranks"], row["engine"], row["attempt"]) for row in rows} == {(1, "torch", 1)}
    assert rows[0]["averages"] == ["500", "power-0.05", "power-0.1"] and rows[0]["steps"] == 8
    said(capsys, "pin", str(run), "--images", "512", "--off")
    assert not pinned(run / "checkpoints")


def test_a_pin_that_is_taken_off_is_off_in_the_store_as_well(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    """Else no retention would ever delete the copy."""
    about = {"id": "a1b2", "hash": "a1b2", "experiment": "digits", "images": 1024}
    write_record(run / "run.json", about, replace=True)
    config = read_config(run / "snapshots" / image_folder(1024) / snapshot.CONFIG)
    train = replace(config.train, checkpoint_store=str(tmp_path / "store"))
    (run / "attempts" / "0001" / "config.yaml").write_text(to_yaml(replace(config, train=train)))
    place = store.place_of(str(tmp_path / "store"), RunFolder(run))
    said(capsys, "pin", str(run), "--images", "512")
    store.put(str(run), 1, place, 1024, {"keep": 1})
    assert pinned(place) == {image_folder(512)}
    said(capsys, "pin", str(run), "--images", "512", "--off")
    assert not pinned(place) and not pinned(run / "checkpoints")
    # of a folder that was purged since
    pin(place, image_folder(960))
    said(capsys, "pin", str(run), "--images", "960", "--off")
    assert not pinned(place)
    with pytest.raises(UserError, match="img-000000960 is not pinned"):
        main(["pin", str(run), "--images", "960", "--off"])


def test_export_writes_the_bits_that_the_run_had(
    run: Path, kept: Kept, capsys: Any, tmp_path: Path
) -> None:
    code, found = said(capsys, "export", str(run), "--out", str(tmp_path / "out"))
    assert code == 0 and found["images"] == 1024
    wanted = {
        "weights": kept.weights[-1],
        "ema-500": kept.averages[0],
        "ema-power-0.05": kept.averages[1],
        "ema-power-0.1": kept.averages[2],
    }
    assert {p.stem for p in (tmp_path / "out").iterdir()} == wanted.keys()
    for stem, flat in wanted.items():
        tensors = load_file(tmp_path / "out" / f"{stem}.safetensors")
        assert torch.equal(torch.cat([tensors[name].flatten() for name in kept.names]), flat)
        assert tensors.keys() - kept.names == {
            "head.norm.running_mean", "head.norm.running_var", "head.norm.num_batches_tracked",
        } & tensors.keys()  # fmt: skip
    published = load_file(run / "snapshots" / image_folder(1024) / "ema-500.safetensors")
    exported = load_file(tmp_path / "out" / "ema-500.safetensors")
    assert exported.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("when", ["hashed", "opened"])
def test_a_checkpoint_that_retention_deletes_while_it_is_read_is_said_to_be(
    run: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that trains on keeps its newest alone."""
    folder = run / "checkpoints" / image_folder(1024)
    if when == "hashed":
        flaws = storage.flaws

        def deleted(at: Any, *rest: Any) -> Any:
            if rest[-1] == "hashes":
                storage.delete(at)
            return flaws(at, *rest)

        monkeypatch.setattr(storage, "flaws", deleted)
        with pytest.raises(UserError, match=f"{folder} was deleted .* pin {run} --images N"):
            open_checkpoint(folder)
    else:
        stored = open_checkpoint(folder)
        storage.delete(folder)
        with pytest.raises(UserError, match=f"{folder} was deleted .* pin {run} --images N"):
            stored.weights()


def test_an_average_at_a_snapshot_reads_no_checkpoint_behind_it(
    run: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.rmtree(run / "snapshots" / image_folder(1024))
    flip(run / "checkpoints" / image_folder(1024) / checkpoint.REPLICATED, 3000)
    out = tmp_path / "out.safetensors"
    words = ["ema", str(run), "--std", "0.07", "--out", str(out)]
    code, made = said(capsys, *words, "--images", "960")
    assert code == 0 and made["images"] == 960


def test_export_of_a_checkpoint_of_before_builds_its_model(tmp_path: Path, capsys: Any) -> None:
    """It says neither shapes nor which buffers are kept."""
    fixture = Path(__file__).parents[1] / "guard" / "fixtures" / "torch_online"
    old = shutil.copytree(fixture, tmp_path / "old")
    code, found = said(capsys, "export", str(old), "--out", str(tmp_path / "out"))
    assert code == 0 and [each["file"] for each in found["files"]] == [
        "weights.safetensors", "ema-20000.safetensors",
    ]  # fmt: skip
    published = load_file(next(old.glob("snapshots/*/ema-20000.safetensors")))
    exported = load_file(tmp_path / "out" / "ema-20000.safetensors")
    assert exported.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in exported.items())


@pytest.mark.parametrize("width", [0.07, 0.15])
def test_ema_of_another_width_is_the_direct_average_of_the_trajectory(
    run: Path, kept: Kept, capsys: Any, tmp_path: Path, width: float
) -> None:
    """The average that the run would have kept, in closed form, from its weights after each step since the switch."""
    out = tmp_path / "out.safetensors"
    code, found = said(capsys, "ema", str(run), "--std", str(width), "--out", str(out))
    assert code == 0 and found["images"] == 1024 and found["error"] < 0.05
    since = kept.weights[SWITCH // BATCH :]
    steps, power = len(since), gamma(width) + 1
    ends = (np.arange(steps + 1) / steps) ** power
    direct = sum(w * weights.double() for w, weights in zip(np.diff(ends), since, strict=True))
    assert isinstance(direct, Tensor)
    made = load_file(out)
    flat = torch.cat([made[name].flatten() for name in kept.names]).double()
    moved = (since[-1] - since[0]).double().norm()
    assert (flat - direct).norm() < 0.01 * moved
    assert (kept.averages[1].double() - direct).norm() > 0.02 * moved, "and no stored one is"


def test_ema_into_a_folder_is_a_snapshot_to_sample_from(
    run: Path, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "snapshot"
    code, _ = said(capsys, "ema", str(run), "--std", "0.1", "--images", "960", "--out", str(out))
    assert code == 0
    found = snapshot.load(out)
    assert found.images == 960 and found.average == AverageSpec(width=0.1)
    stored = load_file(run / "snapshots" / image_folder(960) / "ema-power-0.1.safetensors")
    for name, tensor in found.student.state_dict().items():
        assert torch.allclose(tensor, stored[name], atol=1e-6), "of a stored width, that itself"


def test_ema_of_two_widths_is_a_snapshot_whose_second_average_guides_its_first(
    run: Path, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "two"
    code, said_of = said(capsys, "ema", str(run), "--std", "0.1", "0.2", "--out", str(out))
    assert code == 0 and [each["std"] for each in said_of["averages"]] == [0.1, 0.2]
    said(capsys, "ema", str(run), "--std", "0.2", "--out", str(tmp_path / "alone"))
    guided, alone = snapshot.load(out), snapshot.load(tmp_path / "alone")
    assert guided.average == AverageSpec(width=0.1)
    weak = other_snapshot(guided, WeakModel.of("average-power-0.2"))
    for name, tensor in weak.student.state_dict().items():
        assert torch.equal(tensor, alone.student.state_dict()[name])


def test_a_made_snapshot_is_guided_by_no_snapshot_that_lies_elsewhere(
    run: Path, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guided(path: Path) -> Any:
        config = read_config(path)
        return replace(config, sampler=replace(config.sampler, g=2.0, weak="snapshot-512"))

    monkeypatch.setattr(ema, "read_config", guided)
    out = tmp_path / "made"
    assert said(capsys, "ema", str(run), "--std", "0.07", "--out", str(out))[0] == 0
    sampler = read_config(out / snapshot.CONFIG).sampler
    assert (sampler.g, sampler.weak) == (1.0, "condition")


@pytest.mark.parametrize(
    ("names", "shapes", "said"),
    [
        (["a", "b"], [[2], [3, 4]], None),
        (["a", "b"], [[3], [9, 9]], "a is (3,) there and (2,) here"),
        (["a", "b", "c"], [[3], [3, 4], [1]], "a is (3,) there"),
        (["a", "x", "b"], [[2], [1], [9, 9]], "it holds x"),
        (["a"], [[2]], "it lacks b"),
        (["b", "a"], [[3, 4], [2]], "b has another place"),
    ],
)
def test_the_first_tensor_in_order_that_a_model_holds_otherwise_is_named(
    names: list[str], shapes: list[list[int]], said: str | None
) -> None:
    layout = Layout.of_shapes(["a", "b"], [[2], [3, 4]])
    found = checkpoint._difference({"names": names, "shapes": shapes, "total": 14}, layout)
    assert found == said if said is None else str(found).startswith(said)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["ema", "--std", "0.4"], "--std 0.4"),
        (["ema", "--std", "0.1", "0"], "--std 0"),
        (["ema", "--std", "0.1", "--images", "7"], "--images 7"),
        (["export", "--images", "7"], "--images 7"),
        (["export", "--average", "power-0.2"], "power-0.2"),
        (["export", "--average", "newest"], "newest"),
    ],
)
def test_what_cannot_be_is_refused(run: Path, tmp_path: Path, words: list[str], named: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=named):
        main([words[0], str(run), *words[1:], "--out", str(out)])
    assert not out.exists()


def test_ema_of_two_widths_into_one_file_is_refused_with_a_folder_to_type(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match=f"--std 0.1 0.2: .* --out {tmp_path / 'out'}$"):
        main(["ema", str(run), "--std", "0.1", "0.2", "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("width", [0.05, 0.07, 0.1, 0.15])
def test_reconstruction_of_a_straight_line_is_its_closed_form(width: float) -> None:
    """Weights that are the time itself have the average T (g + 1) / (g + 2)."""

    def mean(images: int, wide: float) -> float:
        return images * (gamma(wide) + 1) / (gamma(wide) + 2)

    stored = [Profile(1000 * step, wide) for step in range(1, 33) for wide in WIDTHS]
    found = reconstruct(stored, Profile(32_000, width))
    sum_of_means = sum(
        w * mean(each.images, each.width) for w, each in zip(found.weights, stored, strict=True)
    )
    assert sum_of_means == pytest.approx(mean(32_000, width), rel=1e-5)
    assert sum(found.weights) == pytest.approx(1.0) and found.error < 3e-3
    if width in WIDTHS:
        assert found.error < 1e-6 and found.weights[stored.index(Profile(32_000, width))] > 0.999


def test_retention_keeps_the_newest_each_so_many_images_and_pins(tmp_path: Path) -> None:
    for images in range(100, 2100, 100):
        folder = tmp_path / image_folder(images)
        storage.publish(folder / "part", b"weights")
        storage.publish_folder(folder, extra={})
        if images == 300:
            pin(tmp_path, folder.name)
        retention.prune(tmp_path, keep=2, every=750, back_to=1350 if images >= 1350 else None)
    left = [int(name[4:]) for name in storage.list(tmp_path) if name.startswith("img-")]
    assert left == [300, 800, 1300, 1500, 1900, 2000]
    unpin(tmp_path, image_folder(300))
    retention.prune(tmp_path, keep=1)
    assert [name for name in storage.list(tmp_path) if name.startswith("img-")] == ["img-000002000"]


def test_retention_that_cannot_delete_goes_on_and_deletes_it_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a file that somebody reads keeps its folder from going."""
    for images in (100, 200, 300):
        storage.publish(tmp_path / image_folder(images) / "part", b"weights")
        storage.publish_folder(tmp_path / image_folder(images), extra={})
    delete = shutil.rmtree

    def busy(folder: Path) -> None:
        if folder.name == image_folder(100):
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))
        delete(folder)

    monkeypatch.setattr(shutil, "rmtree", busy)
    retention.prune(tmp_path, keep=1)
    assert image_folder(100) in caplog.text
    assert sorted(storage.list(tmp_path)) == [image_folder(100), image_folder(300)]
    monkeypatch.undo()
    retention.prune(tmp_path, keep=1)
    assert storage.list(tmp_path) == [image_folder(300)]


def test_a_checkpoint_that_is_pinned_while_others_are_deleted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for images in (100, 200, 300):
        storage.publish(tmp_path / image_folder(images) / "part", b"weights")
        storage.publish_folder(tmp_path / image_folder(images), extra={})
    delete = storage.delete

    def slow(folder: str) -> None:
        pin(tmp_path, image_folder(200))
        delete(folder)

    monkeypatch.setattr(storage, "delete", slow)
    retention.prune(tmp_path, keep=1)
    left = [name for name in storage.list(tmp_path) if name.startswith("img-")]
    assert sorted(left) == [image_folder(200), image_folder(300)]


def test_a_pin_that_comes_too_late_is_refused_and_taken_off(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = pin_command.pin

    def late(place: Path, name: str) -> None:
        storage.delete(place / name)
        keep(place, name)

    monkeypatch.setattr(pin_command, "pin", late)
    with pytest.raises(UserError, match="512"):
        main(["pin", str(run), "--images", "512"])
    assert not pinned(run / "checkpoints")


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_a_checkpoint_that_a_run_deletes_meanwhile_is_not_damaged(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    flaws = storage.flaws

    def deleted(at: Any, *rest: Any) -> Any:
        if str(at).endswith(image_folder(512)):
            storage.delete(at)
        return flaws(at, *rest)

    monkeypatch.setattr(storage, "flaws", deleted)
    code, found = said(capsys, verb, str(run))
    assert code == 0
    states = [each["state"] for each in found["checkpoints"]]
    assert states == ["deleted", "whole", "whole"]


@pytest.mark.parametrize("words", [["export"], ["ema", "--std", "0.07"]])
def test_what_a_full_disk_has_no_room_for_leaves_nothing_and_can_be_asked_for_again(
    run: Path, tmp_path: Path, capsys: Any, words: list[str]
) -> None:
    verb, *more = words
    with disk(tmp_path / "small", 2 << 20) as small:
        asked = [verb, str(run), *more, "--out", str(small.path / "out")]
        small.leave(200_000)
        with pytest.raises(NoRoomError, match="make room"):
            main(asked)
        assert [*small.path.iterdir()] == []
        small.leave(32 << 20)
        code, found = said(capsys, *asked)
        assert code == 0 and found["images"] == 1024
        assert [each.name for each in small.path.iterdir()] == ["out"]


def test_an_average_of_a_run_that_deletes_a_snapshot_meanwhile_is_made_of_the_others(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, words = storage.read_complete, ["ema", str(run), "--std", "0.07", "--out"]

    def deleted(at: Any, **how: Any) -> Any:
        if str(at).endswith(image_folder(640)):
            storage.delete(at)
        return complete(at, **how)

    monkeypatch.setattr(storage, "read_complete", deleted)
    code, found = said(capsys, *words, str(tmp_path / "out"))
    assert code == 0
    named = {each["from"] for each in found["averages"][0]["sources"]}
    assert image_folder(1024) in named and image_folder(640) not in named
    monkeypatch.undo()
    flip(run / "snapshots" / image_folder(704) / "ema-power-0.05.safetensors", 3000)
    with pytest.raises(DamagedError, match=image_folder(704)):
        main([*words, str(tmp_path / "other")])
    # behind what is asked for it is of no matter
    code, found = said(capsys, *words, str(tmp_path / "third"), "--images", "576")
    assert code == 0 and found["images"] == 576


def test_a_snapshot_that_is_deleted_before_it_is_read_is_said_to_be(run: Path) -> None:
    known, _ = ema.sources(RunFolder(run), None)
    source = next(each for each in known if each.folder.name == image_folder(640))
    storage.delete(source.folder)
    with pytest.raises(UserError, match=f"was deleted .* pin {run} --snapshot --images N"):
        source.tensors()


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_the_folder_of_one_unfinished_checkpoint_is_called_that(
    run: Path, capsys: Any, verb: str
) -> None:
    folder = run / "checkpoints" / image_folder(960)
    (folder / storage.MANIFEST).unlink()
    code, found = said(capsys, verb, str(folder))
    (only,) = found["checkpoints"]
    assert code == 0 and only["state"] == "unfinished" and only["checkpoint"] == folder.name
    if verb == "show":
        assert only["images"] == 960


def test_the_table_names_the_checkpoint_that_is_torn(run: Path, capsys: Any) -> None:
    (run / "checkpoints" / image_folder(960) / storage.MANIFEST).write_text("{")
    assert main(["show", str(run)]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "damaged" in each]
    assert line.split()[0] == "960"


@pytest.mark.parametrize("verb", ["verify", "show"])
def test_a_checkpoint_that_is_gone_before_it_is_looked_at_is_deleted(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    read = storage.read_manifest

    def deleted(at: Any) -> Any:
        if str(at).endswith(image_folder(512)):
            storage.delete(at)
        return read(at)

    monkeypatch.setattr(storage, "read_manifest", deleted)
    code, found = said(capsys, verb, str(run))
    assert code == 0
    states = [each["state"] for each in found["checkpoints"]]
    assert states == ["deleted", "whole", "whole"]
