"""`python -m launcher.submit experiment=NAME key=value ...`: a submission, and with -m a sweep of them.

What it does with a run is in `launcher.submission`, the runs that lists of values mean in `launcher.sweep`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import sites
from launcher.reconcile.view import read
from launcher.submission import absolute, check_weak_snapshots, resolve, submit, where
from selfguide.spec.config import Config
from selfguide.spec.lacks import lacks
from selfguide.spec.run import RunFolder
from selfguide.spec.suggest import nearest
from selfguide.spec.validate import validate
from shards import cli
from shards.errors import UserError

SWEEP = ("-m", "--multirun")
FLAGS = (sites.OPTION, "--json", "--help", "-h", "--completion", *SWEEP)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` are the words after its name. Returns the exit code."""
    words = sites.without_config_dir(sys.argv[1:] if arguments is None else arguments)
    flags, overrides = _split(words)
    if "--help" in flags or "-h" in flags or "--completion" in flags:
        from launcher import usage

        print(usage.completion() if "--completion" in flags else usage.text())
        return 0
    if set(SWEEP) & set(flags):
        from launcher import sweep

        return sweep.carry_out(overrides, as_json="--json" in flags)
    config = resolve(overrides)
    validate(config)
    if config.dry_run:
        from launcher import describe

        named = RunFolder(Path(config.runs) / config.experiment / str(config.name))
        check_weak_snapshots(config, read(named) if named.run_json.exists() else None)
        # which autoencoder made latents, their shards say, and those are not read
        missing = lacks(absolute(config), encoder=None)
        print(
            json.dumps(describe.facts(config, missing), indent=1)
            if "--json" in flags
            else describe.text(config, missing)
        )
        return 0
    return carry_out(config, "--json" in flags)


def carry_out(config: Config, as_json: bool, run: RunFolder | None = None) -> int:
    """Submits, says what was done, and follows the run where the config says so; returns the exit code."""
    done = submit(config, run)
    print(json.dumps(done, indent=1) if as_json else _sentences(done, config), flush=True)
    if not config.follow:
        return 0
    from launcher.follow import follow

    return follow(RunFolder(Path(done["folder"])), sys.stderr if as_json else sys.stdout)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """(flags, overrides)."""
    flags = [word for word in words if word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise UserError(
                f"unknown option {flag!r}{nearest(flag, FLAGS)}; settings are written key=value"
            )
    overrides = [word for word in words if not word.startswith("-")]
    if "--completion" in flags and overrides != ["bash"]:
        raise UserError(
            f"--completion {' '.join(overrides)}: only bash is known; write --completion bash"
        )
    return flags, overrides


def _sentences(done: dict[str, Any], config: Config) -> str:
    """What was done, and the commands to go on with."""
    attempt, job, state = done["attempt"], done["job"], done["state"]
    what = {
        "submitted": f"submitted attempt {attempt}: {config.ranks} ranks, job {job}",
        "queued": f"attempt {attempt} is queued already, job {job}; nothing new was submitted",
        "running": f"attempt {attempt} is running already, job {job}; nothing new was submitted",
        "evaluating": "training has finished; its last snapshots are being scored",
        "finished": "the run has finished; nothing was submitted",
        "unknown": "training has finished; nobody can say whether its snapshots are being scored",
    }
    lines = [f"run     {done['run']}", f"folder  {done['folder']}", f"        {what[state]}"]
    if done.get("extended_from"):
        lines.append(
            f"        extended from {done['extended_from']:,} to {done['images']:,} images"
        )
    elif done["images"] != config.train.images:
        lines.append(f"        it was extended to {done['images']:,} images, and trains to those")
    if shorter := done.get("shorter"):
        lines += [
            f"        run {shorter['run']} differs in its {shorter['images']:,} images only; in place of this new "
            "run it can be trained on:",
            f"        {shorter['command']}",
        ]
    lines += [f"        {note}" for note in done.get("notes", ())]
    run = f"{done['run']}{where(config)}"
    return "\n".join(
        [
            *lines,
            "",
            f"  python -m launcher.runs {run}       its state",
            f"  python -m launcher.logs {run} -f    its messages",
            f"  python -m launcher.cancel {run}     end it",
        ]
    )


if __name__ == "__main__":
    cli.run(main)
