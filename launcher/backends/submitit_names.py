"""Submitit and Slurm in folders whose names hold a `%`, which both take for a pattern such as `%j`, the job's number.

`python -m launcher.backends.submitit_names FOLDER` is what a job of such a folder runs in place of Submitit's own
module, which does the same.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

# stands for a % of the folder until the script is written; no path holds it
_MARK = "\x01"
# in a batch script, and in srun's --output
ESCAPED = "%%"


def command(python: str, folder: Path) -> str:
    """Returns what runs a job of this folder, for the shell."""
    module = __name__ if "%" in str(folder) else "submitit.core._submit"
    return f"{python} -u -m {module} {shlex.quote(str(folder))}"


def escaped(folder: Path) -> str:
    """Returns a folder as Slurm is to be given it where it reads patterns."""
    return str(folder).replace("%", ESCAPED)


def script(command: str, folder: Path, **parameters: Any) -> str:
    """Returns the batch script that runs a command whose files lie in this folder."""
    from submitit.slurm import slurm

    marked = str(folder).replace("%", _MARK)
    text = slurm._make_sbatch_string(command=command, folder=marked, **parameters)
    return text.replace(_MARK, ESCAPED)


def install() -> None:
    """Has Submitit of this process fill in patterns in the names of its own files only, and escape those of folders."""
    from submitit.core import utils
    from submitit.slurm import slurm

    # hidden from mypy, which knows better than to replace a function
    paths: Any = utils.JobPaths
    executor: Any = slurm.SlurmExecutor
    if paths._format_id.__module__ != utils.__name__:  # done already
        return
    paths._format_id = in_name_of(paths._format_id)
    paths.get_first_id_independent_folder = staticmethod(Path)
    executor._make_submission_file_text = lambda self, command, uid: script(
        command, self.folder, **self.parameters
    )


def in_name_of(fill: Callable[[Any, Path | str], Path]) -> Callable[[Any, Path | str], Path]:
    """Returns what fills in the last part of a path alone, and nothing in a job's own folder."""

    def in_name(self: Any, path: Path | str) -> Path:
        if Path(path) == self._folder:
            return Path(path)
        return Path(path).parent / fill(self, Path(path).name)

    return in_name


if __name__ == "__main__":
    from submitit.core.submission import submitit_main

    install()
    submitit_main()
