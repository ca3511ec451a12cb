"""`python -m launcher.board`: the leaderboard in the terminal, and as one HTML file beside the runs.

Without a verb it builds the page and shows the tables. Verbs look at it in other ways:

    build                      the page and the tables, as without a verb
    serve                      the page on 127.0.0.1, always as new as the runs
    ls                         the tables alone: --protocol, --filter, --sort
    show RUN                   everything about one run
    diff A B ...               settings and scores in which 2 to 8 runs differ
    curve RUN ...              a score, or the loss, over images
    export --format csv        rows as CSV, JSON or Parquet
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher import folder
from launcher.board import compare, curves, detail, plain, words
from launcher.board import filter as grammar
from launcher.board.collect import Board, collect, history
from launcher.board.export import FORMATS, encoded
from launcher.board.page import write
from launcher.board.read import Run, read_all, read_runs
from launcher.board.terminal import START, show
from launcher.board.views import chosen
from selfguide.spec.suggest import nearest
from shards import cli, storage
from shards.errors import UserError


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.verb == "serve":
        # a web server is not wanted by those who only look
        from launcher.board.serve import serve

        _check_folder(options.runs)
        return serve(options)
    run: Callable[[argparse.Namespace], int] = getattr(options, "call", build)
    _check_folder(options.runs)
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("launcher.board", __doc__, "--runs runs --json")
    _add_common(parser, top=True)
    _add_build(parser)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int] | None, about: str) -> Any:
        made = verbs.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=grammar.__doc__ if name in ("ls", "export") else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_common(made, top=False)
        if run is not None:
            made.set_defaults(call=run)
        return made

    _add_build(verb("build", build, "the page and the tables"))
    _add_serve(
        verb("serve", None, "the page on 127.0.0.1, always as new as the runs; Ctrl-C ends it")
    )
    _add_view(verb("ls", ls, "the tables of the board"))
    one = verb("show", show_run, "everything about one run")
    one.add_argument("name", metavar="RUN", help="id, beginning of an id, name, or folder of a run")
    one.add_argument("--log", type=int, default=0, metavar="N", help="and N lines of its log")
    two = verb("diff", diff, f"settings and scores in which 2 to {compare.MOST} runs differ")
    two.add_argument(
        "names", nargs="+", metavar="RUN", help="the first is what others are held against"
    )
    curve_of = verb("curve", curve, "a score, or a curve of training, over images")
    curve_of.add_argument("names", nargs="+", metavar="RUN", help="runs whose curves are drawn")
    export_of = verb("export", export, "the rows of a view as a file")
    export_of.add_argument("--format", choices=FORMATS, default="csv", help="of the file (csv)")
    export_of.add_argument(
        "--out",
        type=_file,
        metavar="FILE",
        help="the file to write (stdout; parquet needs a file)",
    )
    _add_view(export_of)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """What stands before a verb as well as behind it, where it wins."""

    def default(value: object) -> Any:
        return value if top else argparse.SUPPRESS

    runs_help = "folder of the runs (default: runs)"
    parser.add_argument(
        "--runs", type=folder.runs_folder, default=default(Path("runs")), help=runs_help
    )
    metric_help = "score to rank by (default: the one each protocol names); of curve also loss and others of training"
    parser.add_argument("--metric", default=default(None), help=metric_help)
    parser.add_argument(
        "--json", action="store_true", default=default(False), help="print one JSON value"
    )


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=_file,
        default=argparse.SUPPRESS,
        help="the page to write (default: board.html in that folder)",
    )


def _add_view(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--protocol", metavar="KEY", help="key, its beginning, or metric of one protocol (all)"
    )
    parser.add_argument(
        "--filter", default="", metavar="TERMS", help="rows to show, see below (all)"
    )
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        help="the order of rows, the better end of this column first (rank)",
    )
    parser.add_argument("--reverse", action="store_true", help="the other end first")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="0 takes any that is free (8765)")
    parser.add_argument(
        "--token",
        help="who looks must know it; @FILE reads it, which no list of processes shows (none)",
    )
    parser.add_argument(
        "--every", type=float, default=5.0, metavar="S", help="reads the runs at most so often (5)"
    )


def _file(text: str) -> Path:
    """The type of an argument that is a file of this machine."""
    place = storage.place(text)
    if storage.is_remote(place):
        raise argparse.ArgumentTypeError(f"{text} is on S3: name a file here, and copy it there")
    return Path(place)


def _check_folder(runs: Path) -> None:
    if not runs.is_dir():
        raise UserError(
            f"--runs {str(runs)!r} is no folder; name the runs' folder, or start one: {START}"
        )
    folder.check_level(runs)


# ---- verbs -------------------------------------------------------------------------------------------


def build(options: argparse.Namespace) -> int:
    given = getattr(options, "out", None)
    out = given or options.runs / "board.html"
    if out.is_dir():
        raise UserError(f"--out {str(out)!r} is a folder; name the HTML file to write")
    board = collect(*read_all(options.runs), metric=options.metric)
    try:
        write(board, out, built=time.time())
    except OSError as error:
        raise UserError(
            f"the page cannot be written to {out}: {error.strerror}; name another place by --out, "
            "or look without a page: python -m launcher.board ls"
        ) from error
    if options.json:
        _print_json({"page": str(out), **plain.of_board(board)})
    else:
        show(board, options.runs)
        print(out)
    return 0


def ls(options: argparse.Namespace) -> int:
    board = _view(options)
    if options.json:
        _print_json(plain.of_board(board))
    else:
        show(board, options.runs, options.filter)
    return 0


def export(options: argparse.Namespace) -> int:
    out = getattr(options, "out", None)
    if options.format == "parquet" and out is None:
        raise UserError("--format parquet is no text: name a file, --out board.parquet")
    rows = plain.flat_rows(_view(options))
    if not rows:
        why = f"--filter {options.filter!r} leaves none" if options.filter else "no run has a score"
        print(f"note: no row, for {why}", file=sys.stderr)
    content = encoded(rows, options.format)
    if out is None:
        sys.stdout.write(content.decode())
    elif out.is_dir():
        raise UserError(f"--out {str(out)!r} is a folder; name the file to write")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
        print(out)
    return 0


def _view(options: argparse.Namespace) -> Board:
    board = collect(*read_all(options.runs), metric=options.metric)
    return chosen(
        board,
        protocol=options.protocol,
        text=options.filter,
        sort=options.sort,
        reverse=options.reverse,
    )


def show_run(options: argparse.Namespace) -> int:
    if options.log < 0:
        raise UserError(f"--log {options.log} is no number of lines: give 20, or leave it out")
    (run,) = _named([options.name], options.runs)
    log = detail.log_tail(run, options.log) if options.log > 0 else ""
    if options.json:
        _print_json(plain.of_run(run) | ({"log": log.splitlines()} if options.log > 0 else {}))
        return 0
    _print(words.of_run(run))
    if options.log > 0:
        print(f"\n{log or 'no log yet'}")
    return 0


def diff(options: argparse.Namespace) -> int:
    if not 2 <= len(options.names) <= compare.MOST:
        raise UserError(f"diff takes 2 to {compare.MOST} runs, not {len(options.names)}")
    runs = _named(options.names, options.runs)
    if len(runs) < len(options.names):
        raise UserError(
            f"diff {shlex.join(options.names)} names a run twice: these are {', '.join(run.id for run in runs)}; name "
            "each once, and two or more"
        )
    _check_metric(options.metric, {n for run in runs for r in run.records for n in r.scores})
    settings = compare.settings(runs)
    found = compare.differences(runs, options.metric)
    if options.json:
        answer = {"runs": [run.id for run in runs], "settings": settings}
        _print_json(answer | {"differences": [vars(each) for each in found]})
        return 0
    _print(words.of_settings(runs, settings))
    print()
    _print(words.of_differences(runs[0], found))
    return 0


def curve(options: argparse.Namespace) -> int:
    runs = _named(options.names, options.runs)
    drawn = [(run, name, points) for run in runs for name, points in _curves(run, options.metric)]
    if not drawn:
        known = {n for run in runs for r in run.records for n in r.scores if not n.endswith("_se")}
        known |= {
            name for run in runs for name in (*curves.CURVES, curves.GPU_HOURS) if run.curve(name)
        }
        _check_metric(options.metric, known)
        raise UserError("these runs have neither a score nor a loss yet; look again later")
    for run in runs:
        if not any(run is each for each, _, _ in drawn):
            what = options.metric or "neither a score nor a loss"
            print(
                f"note: run {run.id} has {'no ' if options.metric else ''}{what}", file=sys.stderr
            )
    if options.json:
        _print_json(
            [
                {"run": run.id, "seed": run.seed, "name": name, "points": [list(p) for p in points]}
                for run, name, points in drawn
            ]
        )
        return 0
    for run, name, points in drawn:
        _print(words.of_curve(f"{name} of {run.experiment} {run.id}, seed {run.seed}", points))
        print()
    return 0


Points = list[tuple[float, float, float | None]]


def _curves(run: Run, metric: str | None) -> Iterator[tuple[str, Points]]:
    """The curve of that name under each protocol, else of training; by default of scores, else of the loss."""
    several = len({r.protocol_key for r in run.own if r.done}) > 1
    scored = False
    for key in sorted({r.protocol_key for r in run.own if r.done}):
        records = list(history(run, key).values())
        name = metric or str(records[0].metric)
        if points := words.score_points(records, name):
            scored = True
            yield f"{name} ({key[:8]})" if several else name, points
    if not scored and (trained := run.curve(metric or "loss")):
        yield metric or "loss", [(float(x), y, None) for x, y in trained]


def _named(names: Iterable[str], root: Path) -> list[Run]:
    """The runs that a user means."""
    wanted = list(dict.fromkeys(folder.find(name, root).root.resolve() for name in names))
    runs, problems = read_runs(root)
    known = {run.root.resolve(): run for run in runs}
    # a folder elsewhere
    for place in {path.parent.parent for path in wanted if path not in known}:
        more, also = read_runs(place)
        known |= {run.root.resolve(): run for run in more}
        problems += also
    for path in wanted:
        if path not in known:
            why = next(
                (problem for problem in problems if str(path) in problem), f"{path} cannot be read"
            )
            raise UserError(why)
    return [known[path] for path in wanted]


def _check_metric(metric: str | None, known: set[str]) -> None:
    if metric is not None and metric not in known:
        raise UserError(
            f"--metric {metric!r} is in no record of these{nearest(metric, known)}; known: {', '.join(sorted(known))}"
        )


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _print_json(value: object) -> None:
    print(json.dumps(plain.finite(value), indent=1, allow_nan=False, default=str))


if __name__ == "__main__":
    cli.run(main)
