"""What a Slurm says of itself, as far as `launcher.doctor` wants to know it. Parsing is pure; `read` asks."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# "" where there is no such command or nobody answers
Ask = Callable[[Sequence[str]], str]


@dataclass(frozen=True, kw_only=True)
class Site:
    """Settings of a Slurm that decide what a job loses; None and "" where nobody said."""

    # commands that are not here or do not answer
    silent: tuple[str, ...] = ()
    version: str = ""
    # seconds from the SIGTERM of an ending to SIGKILL
    kill_wait_s: int | None = None
    # seconds until a node that does not answer is taken for lost
    node_timeout_s: int | None = None
    # of preemption: OFF, SUSPEND, REQUEUE, CANCEL, GANG; OFF where nothing preempts
    preempt_mode: str = ""
    # seconds that a preempted job is left before its ending begins
    grace_s: int | None = None
    # it then hears the signal of --signal first
    user_signal: bool = False
    # minutes; None without a limit
    max_time_min: int | None = None
    over_time_limit_min: int = 0
    max_array: int | None = None
    requeue: bool = True
    submit_plugins: str = ""
    accounting: bool = False
    # jobs of this user that may be queued and run at the same time
    max_submit: int | None = None


def read(ask: Ask, partition: str | None, account: str | None, qos: str | None) -> Site:
    """Asks the Slurm of this shell; `partition` may be several, of which the least generous counts."""
    config = settings(ask(["scontrol", "show", "config"]))
    partitions = pairs(ask(["scontrol", "show", "partition", "--oneliner"]))
    # sacctmgr without a database prints an error only
    limits = rows(
        ask(
            [
                "sacctmgr",
                "-nP",
                "show",
                "qos",
                "format=Name,GraceTime,PreemptMode,MaxSubmitPU,MaxWall",
            ]
        )
    )
    user = getpass.getuser()
    shares = rows(
        ask(
            [
                "sacctmgr",
                "-nP",
                "show",
                "assoc",
                f"user={user}",
                "format=Account,MaxSubmit,DefaultQOS",
            ]
        )
    )
    silent = [name for name, said in (("scontrol", config), ("sacctmgr", limits)) if not said]
    return site(config, partitions, limits, shares, partition, account, qos, tuple(silent))


def site(
    config: Mapping[str, str],
    partitions: Sequence[Mapping[str, str]],
    limits: Sequence[Sequence[str]],
    shares: Sequence[Sequence[str]],
    partition: str | None,
    account: str | None,
    qos: str | None,
    silent: tuple[str, ...] = (),
) -> Site:
    """Returns the same from what the commands said.

    Args:
        config: of `scontrol show config`.
        partitions: all, of `scontrol show partition`.
        limits: name, grace, preempt mode, submit limit, wall limit of each QoS.
        shares: account, submit limit, default QoS of each of the user's associations.
    """
    given = _named(partitions, partition)
    mine = [share for share in shares if account in (None, share[0])]
    name = qos or next((share[2] for share in mine if share[2]), "normal")
    of_qos = next((limit for limit in limits if limit[0] == name), [""] * 5)
    # a partition may have a QoS of its own, whose limits hold as well
    theirs = {part.get("QoS") for part in given}
    holding = [of_qos, *(limit for limit in limits if limit[0] in theirs)]
    mode, grace_s = _preemption(config, partitions, given, of_qos)
    walls = [
        minutes(text)
        for text in (*(part.get("MaxTime", "") for part in given), *(h[4] for h in holding))
    ]
    submits = [
        whole(text) for text in (*(limit[3] for limit in holding), *(share[1] for share in mine))
    ]
    flags = f"{config.get('SlurmctldParameters', '')},{config.get('PreemptParameters', '')}".lower()
    return Site(
        silent=silent,
        version=config.get("SLURM_VERSION", ""),
        kill_wait_s=whole(config.get("KillWait", "")),
        node_timeout_s=whole(config.get("SlurmdTimeout", "")),
        preempt_mode=mode,
        grace_s=grace_s,
        user_signal="send_user_signal" in flags,
        max_time_min=_least(walls),
        over_time_limit_min=whole(config.get("OverTimeLimit", "")) or 0,
        max_array=whole(config.get("MaxArraySize", "")),
        requeue=config.get("JobRequeue", "1") != "0",
        submit_plugins=_said(config.get("JobSubmitPlugins", "")),
        accounting=config.get("AccountingStorageType", "").endswith("slurmdbd"),
        max_submit=_least(submits),
    )


def _preemption(
    config: Mapping[str, str],
    partitions: Sequence[Mapping[str, str]],
    given: Sequence[Mapping[str, str]],
    of_qos: Sequence[str],
) -> tuple[str, int | None]:
    """What becomes of a preempted job in the worst of the `given` partitions, and its grace in seconds."""
    kind = config.get("PreemptType", "")
    if kind.endswith("none"):
        return "OFF", None
    if kind.endswith("qos"):
        own = _mode(of_qos[2])
        return own if own not in ("", "CLUSTER") else _mode(config.get("PreemptMode", "")), seconds(
            of_qos[1]
        )
    tiers = [whole(part.get("PriorityTier", "")) or 0 for part in given]
    highest = max((whole(part.get("PriorityTier", "")) or 0 for part in partitions), default=0)
    if highest and min(tiers, default=0) >= highest:
        # only jobs of a partition above preempt
        return "OFF", None
    modes = {_mode(part.get("PreemptMode", "")) for part in given}
    worst = next((mode for mode in ("CANCEL", "REQUEUE", "SUSPEND", "OFF") if mode in modes), "")
    return worst, _least([whole(part.get("GraceTime", "")) for part in given])


def _least(values: Sequence[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def settings(text: str) -> dict[str, str]:
    """Returns the lines `Name = value` of `scontrol show config`."""
    found = re.findall(r"^(\w+)\s*= ?(.*?)\s*$", text, flags=re.MULTILINE)
    return dict(found)


def pairs(text: str) -> list[dict[str, str]]:
    """Returns the words `Name=value` of each line."""
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line.strip()]


def rows(text: str) -> list[list[str]]:
    """Returns the fields of each line, which a bar divides."""
    return [line.split("|") for line in text.splitlines() if "|" in line]


def whole(text: str) -> int | None:
    """Returns the number that a value such as `30 sec` begins with; None for UNLIMITED, NONE and the like."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else None


def minutes(text: str) -> int | None:
    """Returns a time limit, written [days-]hours:minutes:seconds, in minutes; None where there is none."""
    return None if not re.match(r"\d", text) else seconds(text) // 60


def seconds(text: str) -> int:
    """Returns such a time in seconds; 0 where there is none."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return whole(text) or 0
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + rest


def _named(partitions: Sequence[Mapping[str, str]], names: str | None) -> list[Mapping[str, str]]:
    wanted = names.split(",") if names else None
    return [
        part
        for part in partitions
        if (part.get("PartitionName") in wanted if wanted else part.get("Default") == "YES")
    ]


def _mode(text: str) -> str:
    """GANG,SUSPEND and the like by what happens to a job."""
    words = text.upper().split(",")
    return next(
        (word for word in ("CANCEL", "REQUEUE", "SUSPEND", "OFF", "CLUSTER") if word in words), ""
    )


def _said(text: str) -> str:
    return "" if text in ("(null)", "N/A", "none") else text
