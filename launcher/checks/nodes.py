"""What the nodes of a check said of themselves (`launcher.attempt.node`), side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launcher.attempt.finding import Finding
from selfguide.spec.config import ClusterConfig

Reports = Sequence[Mapping[str, Any]]

# free bytes of a node's own disk, for what compilers and Python leave there
SCRATCH = 1 << 30
# as many names of packages in one line
SHOWN = 5
GOES_ON = {"sbatch", "squeue", "scancel"}


def compare(
    reports: Reports, here: Mapping[str, str], cluster: ClusterConfig, weights: str | None = None
) -> list[Finding]:
    """Returns one finding a check over the reports of all nodes.

    Args:
        here: name -> version of the packages of this process, which jobs share where they run the same Python.
        weights: what a run begins from; "" from scratch, None where no run is meant.
    """
    found = [
        _python(reports),
        _packages(reports, here, cluster),
        _torch(reports, cluster),
        _scratch(reports),
    ]
    if cluster.kind != "local" and cluster.restart != "none":
        found.append(_commands(reports))
    if any(report["data"] for report in reports):
        found.append(_data(reports))
    if weights is not None:
        found.append(_weights(reports, weights))
    return found


def _python(reports: Reports) -> Finding:
    by = _groups(reports, lambda report: f"Python {report['python']} ({report['executable']})")
    same = len(by) == 1
    return Finding(
        check="python",
        verdict="ok" if same else "bad",
        text=f"{next(iter(by))} on {_names(reports)}" if same else _list(by),
        cure=""
        if same
        else "nodes must run one environment: an absolute path on a shared file system, or cluster.container",
    )


def _packages(reports: Reports, here: Mapping[str, str], cluster: ClusterConfig) -> Finding:
    first = reports[0]
    for other in reports[1:]:
        if other["packages"] != first["packages"]:
            text = f"{first['node']} and {other['node']} differ: {_difference(first['packages'], other['packages'])}"
            return Finding(
                check="packages", verdict="bad", text=text, cure="nodes must run one environment"
            )
    text = f"{len(first['packages'])} packages, equal on {_names(reports)}"
    apart = cluster.python or cluster.container or cluster.srun
    if first["packages"] != here and not apart:
        text = f"nodes and this machine differ: {_difference(here, first['packages'])}"
        cure = "submit from the environment that nodes see, without PYTHONPATH or a user's own site-packages"
        return Finding(check="packages", verdict="warning", text=text, cure=cure)
    return Finding(
        check="packages", verdict="ok", text=text + (" (those of cluster.python)" if apart else "")
    )


def _torch(reports: Reports, cluster: ClusterConfig) -> Finding:
    broken = [report for report in reports if "error" in report["torch"]]
    if broken:
        text = f"torch cannot be imported on {_names(broken)}: {broken[0]['torch']['error']}"
        return Finding(
            check="torch",
            verdict="bad",
            text=text,
            cure="install it for the Python of jobs, or load its modules",
        )
    by = _groups(reports, lambda report: _of_torch(report["torch"]))
    wanted = cluster.gpus_per_node if cluster.promises_gpus else 0
    short = [report for report in reports if report["torch"]["gpus"] < wanted]
    if short:
        text = f"{wanted} GPUs a node are promised; {_list(by)}"
        cure = "load a CUDA module that fits the driver, give the container --nv, or cluster.request_gpus=false"
        return Finding(check="torch", verdict="bad", text=text, cure=cure)
    return Finding(check="torch", verdict="ok" if len(by) == 1 else "bad", text=_list(by))


def _of_torch(torch: Mapping[str, Any]) -> str:
    names = f" ({', '.join(torch['names'])})" if torch["names"] else ""
    return f"torch {torch['version']}, {torch['gpus']} GPUs{names}"


def _scratch(reports: Reports) -> Finding:
    for report in reports:
        wanted, got = report["scratch"]["wanted"], report["scratch"]["found"]
        if wanted and wanted.rstrip("/") != got.rstrip("/"):
            text = f"TMPDIR={wanted} cannot be used on {report['node']}, so {got} is"
            cure = "cluster.scratch must be a folder that is there on each node when a job starts"
            return Finding(check="scratch", verdict="warning", text=text, cure=cure)
    least = min(reports, key=lambda report: report["scratch"]["free"])
    free = least["scratch"]["free"]
    text = (
        f"{least['scratch']['found']} has {free / 1e9:,.1f} GB free on {least['node']}, the least"
    )
    short = free < SCRATCH
    cure = "give cluster.scratch=FOLDER on a larger disk of the nodes" if short else ""
    return Finding(
        check="scratch",
        verdict="warning" if short else "ok",
        text=text,
        cure=cure,
        figures={"free": free},
    )


def _commands(reports: Reports) -> Finding:
    lacking = {name for report in reports for name in GOES_ON - {*report["commands"]}}
    if not lacking:
        return Finding(
            check="slurm in jobs", verdict="ok", text="a run can go on from its own jobs"
        )
    return Finding(
        check="slurm in jobs",
        verdict="warning",
        text=f"jobs do not find {', '.join(sorted(lacking))}: successors and watchers cannot be submitted from them",
        cure="put Slurm's client on PATH by cluster.setup, and with its configuration and munge into the container",
    )


def _data(reports: Reports) -> Finding:
    broken = [
        (url, report["node"], why)
        for report in reports
        for url, why in report["data"].items()
        if why
    ]
    if broken:
        url, node, why = broken[0]
        cure = "nodes need no internet, but a way to this store, and its AWS_* variables or ~/.aws"
        if "://" not in url:
            cure = "shards must be on a file system that all nodes share"
        return Finding(
            check="data", verdict="bad", text=f"{url} cannot be read on {node}: {why}", cure=cure
        )
    return Finding(
        check="data",
        verdict="ok",
        text=f"{', '.join(reports[0]['data'])} can be read on {_names(reports)}",
    )


def _weights(reports: Reports, path: str) -> Finding:
    lacking = [report for report in reports if report["weights"]]
    if lacking:
        text = f"init.path={path} is not there on {_names(lacking)}"
        cure = "copy it to a file system that all nodes share"
        return Finding(check="weights", verdict="bad", text=text, cure=cure)
    begins = f"begins from {path}, which is there" if path else "begins from scratch"
    text = f"a run fetches nothing from the internet, and {begins}"
    return Finding(check="weights", verdict="ok", text=text)


def _groups(reports: Reports, of: Callable[[Mapping[str, Any]], str]) -> dict[str, list[str]]:
    """What each node says -> the nodes that say it."""
    found: dict[str, list[str]] = {}
    for report in reports:
        found.setdefault(of(report), []).append(report["node"])
    return found


def _list(by: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{what} on {', '.join(nodes)}" for what, nodes in by.items())


def _names(reports: Reports) -> str:
    return ", ".join(report["node"] for report in reports)


def _difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    differing = [
        f"{name} {one.get(name, 'absent')} and {other.get(name, 'absent')}" for name in names
    ]
    return ", ".join(differing[:SHOWN]) + (
        f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    )
