"""What every command of the project shares: errors, exit codes, the console, progress.

Exit codes: 0 done, 1 the answer is "not well", 2 the user's mistake in one line, 130 interrupted.
"""

from __future__ import annotations

import codecs
import errno
import io
import locale
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from shards import signals
from shards.errors import DamagedError, StoreError, UserError

if TYPE_CHECKING:
    import argparse

    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

SHOW_AFTER = 2.0  # seconds before a command shows that it is busy

# the console script, behind which every command has a name
SCRIPT = "selfguide"


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and leaves the process with its exit code."""
    _open_streams()
    _speak_utf8()
    # a parent that ignores it hands that down, and then every program that we call seems to succeed
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        # from here on it has work that ends in order; who ignores it goes on to, such as in the background of a script
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signals.raise_until_heard(signal.SIGINT, KeyboardInterrupt)
        _check_here()
        code = main() or 0
        sys.stdout.flush()
    except (UserError, DamagedError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except PermissionError as error:
        place = error.filename or "the system"
        print(f"error: {place}: you may not do this here: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:  # of no place that a user named
            raise
        # to write to a file that is open names no file
        place = error.filename or "what this command writes"
        cure = ": make room there, and give the command again" if full else ""
        print(f"error: {place}: {error.strerror}{cure}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _open_streams() -> None:
    """Gives a command that was started without stdout or stderr, by `>&-`, ones that nobody reads.

    Python has None there, and prints errors to stdout where it has no stderr.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            nobody = os.open(os.devnull, os.O_WRONLY)
            if nobody != number:  # else a file that the command opens would become its stdout
                os.dup2(nobody, number)
                os.close(nobody)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - until the end


def _check_here() -> None:
    """
    Raises:
        UserError: the working directory is gone, by which names of files and of runs would be read.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError(
            "the working directory does not exist any more: change to another one, such as with `cd`"
        ) from None


def _speak_utf8() -> None:
    """Reads and writes files in UTF-8 whatever the locale is, and shows what a terminal cannot as it is escaped.

    Where Python took another encoding from the locale it begins once more, with the same words: what it has read so far
    of them, and of files, it may have misread.
    """
    encoding = locale.getpreferredencoding(False)
    if codecs.lookup(encoding).name != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        words = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, words, {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def program(module: str) -> str:
    """Returns how the command of a module was called: `selfguide NAME` or `python -m MODULE`."""
    return sys.argv[0] if sys.argv[0].startswith(f"{SCRIPT} ") else f"python -m {module}"


def parser(module: str, about: str | None, example: str = "") -> argparse.ArgumentParser:
    """The parser of a command, whose help shows `about` as it is written.

    Args:
        example: words behind the command's name, for one line of help.
    """
    import argparse

    from shards.words import Parser

    name = program(module)
    return Parser(
        prog=name,
        description=about,
        epilog=f"example: {name} {example}" if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def colours(out: TextIO) -> bool:
    """Whether `out` shows colours: a terminal, unless NO_COLOR or a dumb TERM says otherwise."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def console(*, stderr: bool = False) -> Console:
    """A rich console; imported here because rich costs a quick command a tenth of a second."""
    from rich.console import Console

    return Console(stderr=stderr)


def track(items: Iterable[T], total: int, doing: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal's stderr once they take longer than 2 s."""
    if not sys.stderr.isatty():
        yield from items
        return
    started, done, progress, task = time.monotonic(), 0, None, None
    try:
        for item in items:
            yield item
            done += 1
            if progress is None and time.monotonic() - started > SHOW_AFTER:
                progress = _progress()
                task = progress.add_task(doing, total=total)
                progress.start()
            if progress is not None and task is not None:
                progress.update(task, completed=done)
    finally:
        if progress is not None:
            progress.stop()


def _progress() -> Progress:
    """A bar with what is done, how fast, and how long it will still take."""
    from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.3g}/s")

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), Rate())
    return Progress(*columns, console=console(stderr=True), transient=True)
