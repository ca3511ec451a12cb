"""`python -m launcher.tune RUN key=value ...`: changes a run while it trains, without a new attempt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from launcher.folder import Attempt, find, takes_run
from launcher.reconcile import decide
from launcher.reconcile.state import ENDED
from launcher.reconcile.view import LOOK_S, read
from selfguide.spec import tuning
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder
from shards import cli
from shards.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.tune",
        "Changes a run while it trains; all ranks follow at one step, within seconds. Without settings it\n"
        "lists what was asked, and at which image count it was applied.\n\n"
        "  log_every=IMAGES   from now on, also in later attempts\n"
        "  trace=STEPS        the next steps as a trace for ui.perfetto.dev, in the run's folder traces/\n"
        "  save=now           a checkpoint of this step\n"
        "  stop=after_save    a checkpoint of this step, and then the end; launcher.resume goes on",
        "3f2a trace=20 save=now",
    )
    takes_run(parser)
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="as above (none: list requests)"
    )
    options = parser.parse_intermixed_args(arguments)
    run = find(options.run, Path(options.runs))
    if not options.settings:
        return _list(run, as_json=options.json)
    view = read(run, patience_s=LOOK_S)
    at = Attempt.newest(run)
    if at is None or (word := decide.state(view).word) in ENDED:
        state = "new" if at is None else word
        raise UserError(
            f"run {view.id} is {state}: nothing of it trains; give settings to launcher.resume instead"
        )
    settings = tuning.parse(options.settings, read_config(at.config).train.batch)
    lasting = settings.keys() <= {"log_every"}
    if view.attempts and view.attempts[-1].exits and not lasting:
        raise UserError(
            f"attempt {at.number} of run {view.id} has ended, and the next one has not begun: give {_typed(settings)} "
            f"again once it trains, which `python -m launcher.status {view.id}` shows, or end the run with "
            f"`python -m launcher.cancel {view.id}`"
        )
    number = tuning.ask(run, at.number, settings)
    asked = {"run": view.id, "request": number, "attempt": at.number, "settings": settings}
    if options.json:
        print(json.dumps(asked, indent=1))
    else:
        print(f"request {number} for attempt {at.number} of run {view.id}: {_typed(settings)}")
        print("without settings this command says when it was applied", file=sys.stderr)
    return 0


def _list(run: RunFolder, *, as_json: bool) -> int:
    found = tuning.requests(run)
    if as_json:
        print(json.dumps(found, indent=1))
        return 0
    for each in found:
        applied = each["applied"]
        when = f"applied at {applied['images']:,} images" if applied else "not applied"
        if each["refused"]:
            print(f"{each['number']:>4}  refused: {each['refused']}")
            continue
        print(f"{each['number']:>4}  attempt {each['attempt']}  {_typed(each['settings'])}  {when}")
    if not found:
        print("nothing was asked")
    return 0


def _typed(settings: dict[str, Any]) -> str:
    words = {"save": "now", "stop": "after_save"}
    return " ".join(f"{name}={words.get(name, value)}" for name, value in settings.items())


if __name__ == "__main__":
    cli.run(main)
