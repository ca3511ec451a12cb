"""From pictures to a row on the board, over several nodes: emoji on S3, encoded by an array, learned, ended, scored."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.drill import faults
from launcher.drill.bench import lost
from selfguide.spec.records import PARTS, records
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.cluster.bed import Bed, attempts, gone, trains
from tests.shards.colour_font import picture, write_font, write_list
from tools.environments import InstallError
from tools.s3.server import Server
from tools.shards import debian
from tools.shards.make import EMOJI

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

BATCH, STEPS = 64, 60
EVERY = 20 * BATCH


def font(folder: Path) -> list[str]:
    """Options that name emoji: none for Debian's packages, else a font and a list of our own."""
    try:
        with debian.files(EMOJI, "one of our own"):
            return []
    except (UserError, InstallError):
        codes = range(0x1F600, 0x1F600 + 90)
        colours = {code: (code * 37 % 256, code * 91 % 256, code * 53 % 256, 255) for code in codes}
        drawn = write_font(folder / "colour.ttf", {c: picture(rgb) for c, rgb in colours.items()})
        # nine groups, as Unicode has
        rows = [
            (f"group {n // 10}", f"subgroup {n // 10}", (c,), "fully-qualified", f"emoji {c:x}")
            for n, c in enumerate(codes)
        ]
        listed = write_list(folder / "emoji-test.txt", rows)
        return ["--font", str(drawn), "--emoji-test", str(listed)]


def test_emoji_go_from_pictures_on_s3_through_a_preemption_to_a_row_on_the_board(
    bed: Bed, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    remote = f"s3://{server.bucket}/chain-{uuid.uuid4().hex[:8]}"
    images, latents, weights = f"{remote}/emoji", f"{remote}/latents", tmp_path / "vae.safetensors"

    def does(module: str, *words: str) -> str:
        done = bed.command(module, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    does("tools.shards", "make", "emoji", "--out", images, *font(tmp_path))
    does(
        "tools.vae",
        images,
        "--out",
        str(weights),
        "--width",
        "8",
        "--images",
        "640",
        "--device",
        "cpu",
    )
    encode = ["encode", images, "--encoder", "small", "--weights", str(weights), "--out", latents]
    encode += ["--tasks", "2", "--runs", str(tmp_path / "encode"), "--follow"]
    does("tools.shards", *encode, "--cluster", "devcluster")
    made, encoded = manifests.load(images), manifests.load(latents)
    assert encoded.count == made.count and encoded.label_histogram == made.label_histogram
    assert encoded.model_shape == (4, 8, 8)

    settings = [
        "experiment=emoji_dit", "cluster=devcluster", "nodes=4", "cluster.gpus_per_node=1", "cluster.timeout_min=5",
        "cluster.environment.OMP_NUM_THREADS=1", f"data.root={latents}", "model.width=32", "model.depth=2",
        "model.heads=2", "guidance.layer=1", "guidance.groups=8", f"train.batch={BATCH}",
        f"train.images={STEPS * BATCH}", f"train.snapshot_every={EVERY}", f"train.checkpoint_every={EVERY}",
        f"train.log_every={4 * BATCH}", f"train.warmup_images={BATCH}", f"guidance.teacher_refresh={BATCH}",
        f"evaluation.shards={images}", f"evaluation.decoder={weights}", "evaluation.samples=40", "evaluation.batch=20",
        "sampler.steps=3",
    ]  # fmt: skip
    chain = replace(bed, settings=settings)
    run = chain.submit("chain")
    trains(chain, run, images=EVERY + 4 * BATCH)
    assert len(chain.nodes(run)) == 4
    faults.slow(chain, 0.3, range(4))
    faults.preempt(chain)
    view = chain.finishes(run, 480)
    assert attempts(view) == ["preempted", "ok"]
    assert lost(run) == [0]

    every = [EVERY * number for number in (1, 2, 3)]
    assert list(view.published) == every
    found = [(record.images, record.done) for record in records(run)]
    assert sorted(found) == [(images_seen, True) for images_seen in every]
    gone(chain, run)
    assert not list((run.evals / PARTS).iterdir())

    board = json.loads(does("launcher.board", "--runs", str(chain.runs), "--json"))
    (table,) = board["tables"]
    (row,) = table["rows"]
    assert (table["metric"], row["experiment"], row["images"]) == (
        "fd_effnet",
        "emoji_dit",
        every[-1],
    )
    assert row["score"] is not None
