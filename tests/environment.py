"""A known environment for tests, whatever the shell that started them hands down.

Background shells and nohup ignore SIGINT and SIGHUP, CI systems close standard input, unset HOME or set a locale, and
a shell inside a Slurm job carries its variables. Children inherit all of it, so it is settled once, in this process.
"""

from __future__ import annotations

import os
import pwd
import signal
import tempfile
import time

# Python itself ignores these
_PYTHONS = (signal.SIGPIPE, signal.SIGXFSZ)
# clients of Slurm, another job's ranks, credentials, locale, colours of a terminal, threads, the repository of a hook
_PREFIXES = (
    "SLURM", "SBATCH_", "SQUEUE_", "SCANCEL_", "SACCT_", "SALLOC_", "SINFO_", "SRUN_", "SUBMITIT_", "PMI", "OMPI_",
    "AWS_", "SELFGUIDE_JOB", "NCCL_", "TORCH_", "HYDRA_", "LC_", "CLICOLOR", "GIT_CONFIG",
)  # fmt: skip
_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "COLUMNS", "LINES",
    "TERM", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "COLORTERM", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS", "PYTHONWARNINGS", "PYTHONSAFEPATH", "PYTHONOPTIMIZE", "PYTHONUNBUFFERED",
    "PYTEST_ADDOPTS", "SELFGUIDE_HOST", "SELFGUIDE_DEVCLUSTER", "SELFGUIDE_S3", "LANGUAGE", "ENV", "BASH_ENV", "CDPATH",
    "POSIXLY_CORRECT", "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX",
)  # fmt: skip
# characters of TMPDIR: the path of a socket below it has at most 107 bytes
_LONG = 40
_HERE = "127.0.0.1,localhost,::1"


def settle() -> None:
    """Puts signals, descriptors, umask, locale, time zone and variables where tests expect them."""
    for number in signal.valid_signals():
        if signal.getsignal(number) == signal.SIG_IGN and number not in _PYTHONS:
            # exec keeps no handler: children have the default again, and under nohup this process outlives its terminal
            signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for descriptor in (0, 1, 2):
        _open(descriptor)
    os.umask(0o022)
    for name in [n for n in os.environ if n.startswith(_PREFIXES) or n in _NAMES]:
        del os.environ[name]
    os.environ.setdefault("HOME", pwd.getpwuid(os.getuid()).pw_dir)
    os.environ |= {"LC_ALL": "C.UTF-8", "LANG": "C.UTF-8", "TZ": "UTC"}
    # two cores, several ranks
    os.environ["OMP_NUM_THREADS"] = "1"
    # package indexes may be behind a proxy; servers that tests start never are
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = _HERE
    time.tzset()
    if len(os.environ.get("TMPDIR", "")) > _LONG:
        del os.environ["TMPDIR"]
        tempfile.tempdir = None


def _open(descriptor: int) -> None:
    """A closed standard descriptor would be the number of the next file that is opened."""
    try:
        os.fstat(descriptor)
    except OSError:
        found = os.open(os.devnull, os.O_RDWR)
        if found != descriptor:
            os.dup2(found, descriptor)
            os.close(found)
