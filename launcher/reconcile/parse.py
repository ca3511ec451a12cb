"""Files of a run as `view` parses them: one call, one file or folder, nothing asked of anybody else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.records import LATEST, EvaluationRecord
from selfguide.spec.retention import Deleted
from selfguide.spec.run import names_in
from selfguide.spec.score_sweep import ScoreSweep
from selfguide.spec.selections import Selection, read_selection
from shards import storage
from shards.errors import DamagedError

# files that nobody asks for in a list of runs
LONG = ("request.json", "code.json")

# bytes that are read at once: more is memory of its own for each file, and costs more than reading twice
_READ = 1 << 17

# of records, by their keys
_PROTOCOLS: dict[str, Any] = {}

# where p(k) begins in the text of a manifest; quotes within a string have a backslash
_P = b'"p": ['


def objects(folder: str) -> dict[str, dict[str, Any]]:
    """The JSON objects of a folder by the names of their files, but for those as long as a config."""
    names = [name for name in names_in(Path(folder)) if name.endswith(".json")]
    return {name: json_object(f"{folder}/{name}") for name in names if name not in LONG}


def content(path: str) -> bytes:
    """What a small file holds. Of tens of thousands, Python's file objects take more calls than the reading."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(handle, _READ)
        # of a file, what is less than asked for is all of it
        if len(data) == _READ:
            data += b"".join(iter(lambda: os.read(handle, _READ), b""))
        return data
    finally:
        os.close(handle)


def json_object(path: str) -> dict[str, Any]:
    """The object that a file holds; ValueError where it holds something else."""
    found = json.loads(content(path).decode())
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of an object")
    return found


def record(path: str) -> EvaluationRecord:
    """The record of an evaluation."""
    values = json_object(path)
    key, protocol = str(values.get("protocol_key")), values.get("protocol")
    # thousands of records are under one, which is half of what is kept of them
    first = _PROTOCOLS.setdefault(key, protocol)
    return EvaluationRecord.of(values | {"protocol": first} if first == protocol else values)


def sweep(path: str) -> ScoreSweep:
    """A sweep over how a snapshot is sampled."""
    return ScoreSweep.of(json_object(path))


def deleted(path: str) -> Deleted:
    """That retention has deleted a snapshot."""
    return Deleted.of(json_object(path))


def selection(path: str) -> Selection:
    """That a run was chosen among others."""
    return read_selection(Path(path))


def config(path: str) -> Config:
    """The config of an attempt."""
    return read_config(Path(path))


def without_p(path: str) -> dict[str, Any]:
    """The manifest of a snapshot; thousands of them with their p(k) are hundreds of megabytes."""
    data = content(path)
    # a thousand numbers take longer to parse than all the rest
    before, begins, rest = data.partition(_P)
    try:
        manifest = storage.parse_manifest(before + begins + rest[rest.find(b"]") :], path)
    except DamagedError:
        manifest = storage.parse_manifest(data, path)
    guidance = {key: value for key, value in manifest.get("guidance", {}).items() if key != "p"}
    return {**manifest, "guidance": guidance}


def ranks(names: set[str], kind: str) -> list[str]:
    """Ranks whose `<kind>-<rank>.json` is among the names of files."""
    return sorted(
        name[len(kind) + 1 : -5]
        for name in names
        if name.startswith(f"{kind}-") and name.endswith(".json")
    )


# numbers of the trainer's report
_PROGRESS = ("time", "images", "of", "loss", "images_per_s", "eta_s", "resumed_from", "save_s")


def progress(path: str) -> dict[str, Any]:
    """The trainer's report; ValueError where one of its numbers is none."""
    found = json_object(path)
    for name in _PROGRESS:
        value = found.get(name)
        if value is not None and type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}")
    for name in ("images", "of", "resumed_from"):
        if not abs(found.get(name) or 0) < 2**63:
            raise ValueError(f"{name} is {found[name]!r}")
    moment(found.get("time") or 0)
    return found


def moment(seconds: Any) -> float:
    """Seconds since 1970; ValueError for what no calendar has."""
    found = float(seconds)
    if not 0 <= found < LATEST:
        raise ValueError(f"{seconds!r} is no time in seconds since 1970")
    return found


def began_from(progress: Mapping[str, Any]) -> int | None:
    """Images of the checkpoint that an attempt began from, by the trainer's report, which has None for scratch."""
    if progress.get("section") in (None, "joining"):
        return None
    return int(progress.get("resumed_from") or 0)


def changed(folder: Path) -> float:
    """When a file or folder last changed; 0 where there is none."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # a submission that was refused has removed it
        return 0.0
