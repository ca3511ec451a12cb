"""`python -m launcher.resume RUN [train.images=N] [key=value ...]`: trains a run on, by the config it keeps itself.

Settings say how it runs from now on, such as cluster=slurm, nodes=2 or train.snapshot_every=64_000. Of those that
make a run what it is, only `train.images` may change, and only upwards: that extends the run, which keeps its id.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import backends, submit
from launcher.compose import changed, without_group
from launcher.folder import find, takes_run
from launcher.reconcile.view import read
from launcher.sites import takes_config_dir
from launcher.submission import check_weak_snapshots
from selfguide.spec.config import Config
from selfguide.spec.corrections import kept_from_before
from selfguide.spec.run import RunFolder
from selfguide.spec.validate import validate
from shards import cli
from shards.errors import UserError

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.resume",
        "Resumes a run that stopped, from its newest checkpoint and by its own config; joins it while it\n"
        "works. train.images=N extends it, also when it has finished.",
        "3f2a train.images=1_024_000 cluster.partition=gpu",
    )
    takes_run(parser)
    takes_config_dir(parser)
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="how it runs from now on, or train.images"
    )
    options = parser.parse_intermixed_args(arguments)
    run = find(options.run, Path(options.runs))
    config = resumed(run, options.settings)
    validate(config)
    for kept in kept_from_before(config):
        log.warning(f"run {run.root.name}: {kept}")
    if config.dry_run:
        from launcher import describe

        check_weak_snapshots(config, read(run), config.train.images)
        facts = describe.facts(config)
        print(json.dumps(facts, indent=1) if options.json else describe.text(config))
        return 0
    return submit.carry_out(config, options.json, run)


def resumed(run: RunFolder, settings: Sequence[str]) -> Config:
    """Returns the config of the run's next attempt: that of its newest one with these settings changed.

    Raises:
        UserError: a setting that is none, or the config is gone or of another version.
    """
    view = read(run)
    if view.config is None:
        problem = view.problems[0] if view.problems else f"run {view.id} has no attempt yet"
        raise UserError(f"{problem}; submit it again by its own command")
    for text in settings:
        if text.partition("=")[0] in ("experiment", "name", "runs"):
            raise UserError(f"{text!r}: a run keeps its experiment, name and folder; drop it")
    kept = replace(
        view.config,
        name=view.name,
        runs=str(run.root.parent.parent),
        train=replace(view.config.train, images=view.images),
        follow=False,
        dry_run=False,
    )
    config = changed(kept, settings)
    if config.cluster.kind != "auto":
        return config
    chosen = f"cluster={backends.automatic()}"
    return changed(kept, [*without_group(settings, "cluster"), chosen])


if __name__ == "__main__":
    cli.run(main)
