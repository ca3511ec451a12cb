"""Damage to a checkpoint is noticed before it is loaded, and named; the run goes on from one that holds."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.run import Fenced, Lease, RunFolder, image_folder
from selfguide.training import resume
from selfguide.training.checkpoint import REPLICATED
from selfguide.training.retention import prune
from shards import storage
from shards.errors import StoreError, UserError
from tests.selfguide.test_training import IMAGES, assert_same, attempt, config, weights
from tests.shards.data import flip

RANK_1 = "rank-00001.safetensors"


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks from its first to its last image, with all its checkpoints."""
    from tools.ranks import run_ranks

    root = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(2, attempt, config(digits, "deepspeed"), str(root))
    return root


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """copy(name, until) -> a copy of that run that was interrupted after so many images."""

    def made(name: str = "run", until: int = 384) -> Path:
        root = tmp_path / name
        shutil.copytree(whole, root)
        for folder in [*root.glob("checkpoints/img-*"), *root.glob("snapshots/img-*")]:
            if int(folder.name[4:]) > until:
                shutil.rmtree(folder)
        return root

    return made


def attempts(rank_info: RankInfo, cfgs: list[tuple[Config, str]]) -> list[tuple[str, list[str]]]:
    """One attempt of each run in turn: how it ended on this rank, and what this rank's log said aloud."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("selfguide").addHandler(handler)
    found = []
    for cfg, root in cfgs:
        try:
            end = f"attempt {attempt(rank_info, cfg, root)}"
        except (UserError, StoreError) as error:
            end = f"{type(error).__name__}: {error}"
        found.append((end, said.copy()))
        said.clear()
    return found


def progress(root: Path, number: int = 2) -> dict[str, Any]:
    return json.loads((root / "attempts" / f"{number:04d}" / "progress.json").read_text())


def test_resume_with_a_flipped_bit_names_it_and_goes_on_from_the_one_before(
    ranks: Any, digits: Path, copy: Callable[..., Path], whole: Path
) -> None:
    """In a file of a rank, in what all load, and in a manifest of before, which has sha256 only."""
    cfg = config(digits, "deepspeed")
    roots = {name: copy(name) for name in (RANK_1, REPLICATED, "old")}
    for name, root in roots.items():
        newest = root / "checkpoints" / image_folder(384)
        if name == "old":
            about = json.loads((newest / storage.MANIFEST).read_text())
            for part in about["files"]:
                del part["xxh3"]
            (newest / storage.MANIFEST).write_text(json.dumps(about))
        damaged = newest / (RANK_1 if name == "old" else name)
        flip(damaged, damaged.stat().st_size - 100)
        assert RunFolder(root).saved()[-1] == 384, "sizes show nothing"
    first, second = ranks(2, attempts, [(cfg, str(root)) for root in roots.values()])
    for (name, root), (end, said), (other_end, other_said) in zip(
        roots.items(), first, second, strict=True
    ):
        file = RANK_1 if name == "old" else name
        kept = root / "checkpoints" / "damaged" / f"{image_folder(384)}.0002"
        assert end == other_end == "attempt 2" and other_said == []
        assert (
            len(said) == 2
            and ("of rank 1: " in said[0]) == (file == RANK_1)
            and file in said[0]
            and str(kept) in said[0]
        )
        assert image_folder(256) in said[1]
        (told,) = progress(root)["damaged"]
        assert (told["images"], told["kept"]) == (384, str(kept))
        (flaw,) = told["flaws"]
        assert (flaw["file"], flaw["rank"]) == (file, 1 if file == RANK_1 else None)
        assert ("sha256" if name == "old" else "xxh3") in flaw["reason"]
        assert (kept / storage.MANIFEST).is_file() and (kept / file).is_file()
        assert RunFolder(root).saved() == [128, 256, 384, IMAGES], "written anew"
        assert_same(weights(root), weights(whole))


def test_resume_at_another_world_size_supersedes_a_truncated_checkpoint(
    ranks: Any, digits: Path, copy: Callable[..., Path]
) -> None:
    root = copy()
    newest = root / "checkpoints" / image_folder(384)
    with (newest / RANK_1).open("r+b") as file:
        file.truncate(1000)
    cfg = config(digits, "torch")
    (((end, said),),) = ranks(1, attempts, [(cfg, str(root))])
    assert end == "attempt 2" and f"{RANK_1} has 1,000 bytes" in said[0]
    manifest = storage.read_complete(newest, verify="hashes")
    assert manifest is not None and manifest["attempt"] == 2
    assert [f["name"] for f in manifest["files"]] == ["rank-00000.safetensors", REPLICATED]
    assert sorted(p.name for p in newest.iterdir()) == [
        storage.MANIFEST, "rank-00000.safetensors", REPLICATED,
    ]  # fmt: skip


def test_resume_with_all_checkpoints_damaged_begins_at_0_aloud_and_ends_alike(
    ranks: Any, digits: Path, copy: Callable[..., Path], whole: Path
) -> None:
    root, strict = copy(), copy("strict")
    for each in (root, strict):
        for images, damage in ((384, "flip"), (256, "manifest"), (128, "missing")):
            folder = each / "checkpoints" / image_folder(images)
            if damage == "flip":
                flip(folder / RANK_1, 50_000)
            elif damage == "manifest":
                (folder / storage.MANIFEST).write_text("{")
            else:
                (folder / RANK_1).unlink()
    cfg = config(digits, "deepspeed")
    stern = replace(cfg, train=replace(cfg.train, resume="strict"))
    before = sorted((strict / "checkpoints").glob("*/*"))
    first, second = ranks(2, attempts, [(stern, str(strict)), (cfg, str(root))])
    for end, _ in (first[0], second[0]):
        assert end.startswith("UserError: train.resume=strict")
        assert f"launcher.resume {strict} train.resume=newest" in end and "image 0" in end
    after = sorted((strict / "checkpoints").glob("img-*/*"))
    assert after == [p for p in before if p.parent.name != ".leases"], "nothing was moved"
    end, said = first[1]
    assert end == "attempt 2" and len(said) == 4
    assert all(image_folder(i) in line for i, line in zip((384, 256, 128), said[:3], strict=True))
    assert "image 0" in said[3]
    assert [each["images"] for each in progress(root)["damaged"]] == [384, 256, 128]
    assert_same(weights(root), weights(whole))


def test_a_final_snapshot_that_is_gone_or_damaged_is_published_from_the_checkpoint(
    ranks: Any, digits: Path, copy: Callable[..., Path], whole: Path
) -> None:
    roots = [copy(how, until=IMAGES) for how in ("lost", "flip", "truncated")]
    for root in roots:
        final = root / "snapshots" / image_folder(IMAGES)
        file = final / "ema-2000.safetensors"
        if root.name == "lost":
            shutil.rmtree(final)
        elif root.name == "flip":
            flip(file, 50_000)
        else:
            file.write_bytes(b"")
    cfg = config(digits, "deepspeed")
    (ends,) = ranks(1, attempts, [(cfg, str(root)) for root in roots])
    assert ends == [("attempt 2", [])] * 3
    for root in roots:
        before, after = (
            {p.name: p.read_bytes() for p in (r / "snapshots" / image_folder(IMAGES)).iterdir()}
            for r in (whole, root)
        )
        assert before == after, "averages, buffers and manifest alike"
        assert (root / "snapshots" / "damaged").exists() == (root.name != "lost")


def _reads_other_bytes(rank_info: RankInfo, root: str) -> str:
    """Rank 1 is on a node whose memory or mount is not to be trusted."""
    run = RunFolder(Path(root))
    lease = Lease(run, run.attempt_numbers()[-1])
    hashes = storage.complete.hashes
    if rank_info.rank == 1:
        storage.complete.hashes = lambda url, kinds: dict.fromkeys(kinds, "0")  # type: ignore[assignment]
    try:
        return str(resume.find(lease, rank_info, "newest").folder)
    except StoreError as error:
        return str(error)
    finally:
        storage.complete.hashes = hashes


def test_a_node_that_reads_other_bytes_is_named_and_nothing_set_aside(
    ranks: Any, copy: Callable[..., Path]
) -> None:
    root = copy()
    ends = ranks(2, _reads_other_bytes, str(root))
    assert ends[0] == ends[1] and "rank 1 reads it" in ends[0] and RANK_1 in ends[0]
    assert RunFolder(root).saved() == [128, 256, 384]


def test_an_attempt_overtaken_while_it_reads_sets_nothing_aside(
    single: RankInfo, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(copy())
    flip(run.checkpoint(384) / RANK_1, 50_000)
    old = Lease(run, run.open_attempt())
    old.begin()
    read = resume._read_together

    def overtaken(*arguments: Any) -> Any:
        Lease(run, run.open_attempt()).begin()
        monkeypatch.setattr(resume, "_read_together", read)
        return read(*arguments)

    monkeypatch.setattr(resume, "_read_together", overtaken)
    with pytest.raises(Fenced):
        resume.find(old, single, "newest")
    assert (run.checkpoint(384) / storage.MANIFEST).is_file()
    found = resume.find(Lease(run, 3), single, "newest")
    assert found.folder == run.checkpoint(256)
    assert [each.images for each in found.damaged] == [384]


def test_what_killed_attempts_left_is_ignored_and_removed(
    single: RankInfo, copy: Callable[..., Path]
) -> None:
    """Drafts, outboxes, a checkpoint without its manifest; and a file that points somewhere means nothing."""
    run = RunFolder(copy())
    half = run.checkpoint(448)
    half.mkdir()
    drafts = [
        half / f".{RANK_1}.0123456789ab.tmp",
        run.checkpoint(384) / f".{REPLICATED}.0123456789ab.tmp",
        run.snapshot(256) / ".ema-2000.safetensors.0123456789ab.tmp",
        run.checkpoints / ".leases" / "0001" / f".{storage.MANIFEST}.0123456789ab.tmp",
    ]
    for path in [*drafts, half / RANK_1]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    # an attempt was killed while it set a checkpoint aside
    (run.checkpoints / ".leases" / "0001" / f".{image_folder(64)}.0123456789ab.tmp").mkdir()
    for name in ("latest", "LATEST"):
        (run.checkpoints / name).write_text("")
    lease = Lease(run, run.open_attempt())
    lease.begin()
    assert resume.find(lease, single, "strict") == resume.Resume(run.checkpoint(384))
    assert not any(path.exists() for path in [*drafts, half])


def test_prune_deletes_what_is_damaged_once_it_is_older_than_all_that_is_kept(
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path)
    lease = Lease(run, run.open_attempt())
    for images in (1, 2, 3):
        folder = run.checkpoint(images)
        storage.publish(folder / "part", b"weights")
        lease.publish(folder, extra={})
    lease.set_aside(run.checkpoint(2))
    kept = run.checkpoints / "damaged" / f"{image_folder(2)}.0001"
    (kept.parent / "notes of a person").touch()
    prune(run.checkpoints, keep=2)
    assert kept.is_dir() and run.saved() == [1, 3]
    prune(run.checkpoints, keep=1)
    assert not kept.exists() and run.saved() == [3]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("files", [1, 2, 8])
def test_every_file_is_hashed_once_by_a_rank_and_what_all_load_once_a_node(
    world: int, files: int
) -> None:
    names = [f"rank-{i:05d}.safetensors" for i in range(files)] + [REPLICATED]
    hashed = [
        name
        for rank in range(world)
        for name in resume._share(names, RankInfo(rank, rank % 4, world))
    ]
    assert sorted(n for n in hashed if n != REPLICATED) == names[:-1]
    assert hashed.count(REPLICATED) == -(-world // 4)
