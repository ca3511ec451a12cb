"""Which snapshot of a run is best against its training images, as papers choose the one they report; beside the last.

    python -m tools.best RUN                        by the score that the run is ranked by
    python -m tools.best RUN --metric fid_clean     by another one

SGFM and SGDM score a checkpoint every so often against training images, and report the best one, the latter against
validation images (Hu et al. 2023, arXiv 2312.08825 and 2210.06462). The best of many looks better than it is, so the
choice is written into the run as `best_on_train`, with what it was among, and the board ranks that snapshot's score in
this net behind its badge; the last snapshot stands beside it. Scores against other images chose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfguide.spec.find import find
from selfguide.spec.metrics import METRICS
from selfguide.spec.records import EvaluationRecord, records
from selfguide.spec.run import RunFolder, read_record
from selfguide.spec.selections import BEST_ON_TRAIN, select
from selfguide.spec.suggest import check_known
from shards import cli
from shards.errors import UserError
from tools import drawing, flags

# snapshots of fewer are no choice
LEAST = 2


def main(argv: Sequence[str] | None = None) -> int:
    options = flags.command(
        "tools.best",
        __doc__,
        ("run RUN", str, None, flags.RUN),
        flags.RUNS,
        ("--metric SCORE", str, None, "the score that chooses (the run's own)"),
        ("--protocol KEY", str, None, "of these records, by the beginning of their key"),
        flags.JSON,
    ).parse_args(argv)
    run = find(options.run, Path(options.runs))
    done = [each for each in records(run) if each.done and not each.sweep]
    among = on_train(run, done, options.metric, options.protocol)
    metric = options.metric or str(among[0].metric)
    best, last = chosen(among, metric), among[-1]
    counts = [f"{each.images:,} images" for each in among]
    select(run, best.protocol, by=BEST_ON_TRAIN, images=best.images, among=counts)
    said = {
        "selection": BEST_ON_TRAIN,
        "metric": metric,
        "protocol": best.protocol_key,
        "among": [each.images for each in among],
        "best": _scores(done, best.images),
        "last": _scores(done, last.images),
    }
    print(json.dumps(said)) if options.json else _show(said, best, last)
    return 0


def on_train(
    run: RunFolder, done: Sequence[EvaluationRecord], metric: str | None, protocol: str | None
) -> list[EvaluationRecord]:
    """The run's scores against its own training images under one protocol, by images seen.

    Raises:
        UserError: there are none, of one snapshot alone, or under several protocols.
    """
    if metric is not None:
        check_known("--metric", metric, METRICS)
    identity = (read_record(run.run_json) or {}).get("identity", {})
    trained_on = identity.get("data", {}).get("manifest")
    found = [
        each
        for each in done
        if each.protocol.get("reference") == trained_on
        and each.protocol_key.startswith(protocol or "")
        and (metric or each.metric) in each.scores
    ]
    keys = sorted({each.protocol_key for each in found})
    if len(keys) > 1:
        raise UserError(
            f"{run.root} is scored against its training images by protocols {', '.join(keys)}; name one with "
            "--protocol KEY, or a score that only one has with --metric"
        )
    # of a snapshot that was scored twice the last try
    by_images = {each.images: each for each in sorted(found, key=lambda each: each.attempt)}
    if len(by_images) < LEAST:
        raise UserError(
            f"{run.root} has {len(by_images)} snapshots with a score against its training images, which leaves no "
            "choice; score more with `python -m launcher.evaluate RUN`, without evaluation.shards and a reference file"
        )
    return [by_images[images] for images in sorted(by_images)]


def chosen(among: Sequence[EvaluationRecord], metric: str) -> EvaluationRecord:
    """The best of them; of equals the first."""
    sign = -1 if METRICS[metric].higher_is_better else 1
    return min(among, key=lambda each: sign * each.scores[metric])


def _scores(done: Sequence[EvaluationRecord], images: int) -> dict[str, Any]:
    """What one snapshot has under each protocol."""
    by_key = {each.protocol_key: dict(each.scores) for each in done if each.images == images}
    return {"images": images, "scores": by_key}


def _show(said: dict[str, Any], best: EvaluationRecord, last: EvaluationRecord) -> None:
    rows = []
    for which, record in (("best", best), ("last", last)):
        for key, scores in said[which]["scores"].items():
            shown = [name for name in scores if name in METRICS]
            values = ", ".join(f"{METRICS[name].heading} {scores[name]:.4g}" for name in shown)
            rows.append(
                {"": which, "images": f"{record.images:,}", "protocol": key, "scores": values}
            )
    heading = METRICS[said["metric"]].heading
    title = f"{said['selection']}: by {heading} among {len(said['among'])} snapshots"
    cli.console().print(drawing.table(title, rows, names=4))


if __name__ == "__main__":
    cli.run(main)
