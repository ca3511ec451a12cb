"""A known environment for tests, whatever the shell that started them hands down.

Background shells and nohup ignore SIGINT and SIGHUP, CI systems close standard input, unset HOME or set a locale, and
a shell inside a Slurm job carries its variables. Children inherit all of it, so it is settled once, in this process.
"""

from __future__ import annotations

import os
import pwd
import signal
import time

_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# clients of Slurm, another job's ranks, credentials, the width and colours of a terminal, devices, threads
_PREFIXES = (
    "SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_", "SALLOC_", "SINFO_", "SRUN_", "SUBMITIT_", "PMI", "AWS_",
    "SELFGUIDE_JOB", "NCCL_", "TORCH_", "HYDRA_",
)  # fmt: skip
_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "COLUMNS", "LINES",
    "TERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS", "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS", "PYTHONWARNINGS", "PYTHONSAFEPATH", "PYTHONOPTIMIZE", "SELFGUIDE_HOST", "LANGUAGE", "ENV",
    "BASH_ENV", "CDPATH",
)  # fmt: skip
_HERE = "127.0.0.1,localhost,::1"


def settle() -> None:
    """Puts signals, descriptors, umask, locale, time zone and variables where tests expect them."""
    for number in _SIGNALS:
        ignored = signal.getsignal(number) is signal.SIG_IGN
        if ignored:
            interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)
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


def _open(descriptor: int) -> None:
    """A closed standard descriptor would be the number of the next file that is opened."""
    try:
        os.fstat(descriptor)
    except OSError:
        found = os.open(os.devnull, os.O_RDWR)
        if found != descriptor:
            os.dup2(found, descriptor)
            os.close(found)
