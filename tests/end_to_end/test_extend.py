"""A run that is extended ends with the weights of one that was as long from the start."""

from __future__ import annotations

from pathlib import Path

from launcher import resume, submit

DIGITS = Path(__file__).parents[1] / "guard" / "fixtures" / "digits"


def weights(runs: Path, images: int) -> bytes:
    (snapshot,) = runs.glob(f"*/first/snapshots/img-{images:09d}/*.safetensors")
    return snapshot.read_bytes()


def test_extended_run_ends_bitwise_equal_to_one_that_was_as_long_from_the_start(
    tmp_path: Path,
) -> None:
    settings = [
        "experiment=digits_dit",
        "cluster=local",
        "cluster.gpus_per_node=1",
        "engine=torch",
        "guidance=none",
        "evaluation=none",
        f"data.root={DIGITS}",
        "train.snapshot_every=640",
        "train.checkpoint_every=640",
        "train.log_every=640",
        "train.warmup_images=0",
        "name=first",
        "follow=true",
    ]
    short, long = tmp_path / "short", tmp_path / "long"
    assert submit.main([*settings, f"runs={short}", "train.images=640"]) == 0
    final = weights(short, 640)
    assert resume.main(["first", "--runs", str(short), "train.images=1280", "follow=true"]) == 0
    assert submit.main([*settings, f"runs={long}", "train.images=1280"]) == 0
    assert weights(short, 1280) == weights(long, 1280)
    assert weights(short, 640) == final
