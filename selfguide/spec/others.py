"""Scores of others' samples, kept beside the runs, so that they stand on the same board.

`python -m tools.score ... --as NAME` writes one file for each name and way of measuring, RUNS/.others/<digest>.json.
A run's protocol says how its samples were measured and how they were drawn. Of others' samples the first alone is
known, so two scores are measured alike where all that `selfguide.spec.records.measuring` lists is equal: the metric and
its version, the feature net, resize, quantisation and normalisation, the reference with its content, part and windows,
the number of samples, and what is measured beside. Left out is how samples are drawn: labels, seed, sampler, steps,
tolerance, batch, guidance and its interval, average, dtype, further settings, the decoder of latents, and sets.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from selfguide.spec.identity import digest
from selfguide.spec.records import LATEST, check_kind
from selfguide.spec.run import names_in, strict_json
from shards import storage

# in the folder of all runs
FOLDER = ".others"
# of the file
SCHEMA = 1
# characters at most; of a note half of them are for what a command adds to what somebody typed
NAME, NOTE, TYPED_NOTE = 100, 1000, 500

# what a field of a protocol that says how samples are measured is in JSON; of those that are optional None too
_REQUIRED: Mapping[str, type] = {
    **dict.fromkeys(("metric", "feature_sha256", "resize", "quantisation", "reference"), str),
    **dict.fromkeys(("version", "samples"), int),
}
_OPTIONAL: Mapping[str, type] = {
    **dict.fromkeys(("normalisation", "net", "reference_sha256", "crop"), str),
    **dict.fromkeys(("reference_count", "reference_seed"), int),
    "extras": dict,
}
MEASURING = (*_REQUIRED, *_OPTIONAL)
# of a count of images, which stands in columns of signed numbers
_COUNT = 2**63
# control characters, halves of characters, and what ends a line or paragraph
_UNFIT = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True, kw_only=True)
class OtherRecord:
    """The scores of somebody's samples, measured in one way."""

    name: str
    note: str = ""
    # how they were measured, as `measured` has it
    protocol: Mapping[str, Any]
    # finite ones only
    scores: Mapping[str, float]
    # the score without each block of its jackknife in turn
    left_out: tuple[float, ...] = ()
    # seconds since 1970
    when: float
    host: str = ""
    # name of the samples' file or folder, and a digest of path, size and time of each file
    samples: str = ""
    stamp: str = ""

    @property
    def metric(self) -> str:
        """The score that the protocol is named after."""
        return str(self.protocol["metric"])

    @classmethod
    def of(cls, values: Any) -> OtherRecord:
        """From a file's JSON.

        Raises:
            ValueError: it is of another schema, holds a value that readers could not reckon with, or is none.
        """
        try:
            return cls._of(values)
        except KeyError as error:
            raise ValueError(f"no {error}") from error
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(str(error)) from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> OtherRecord:
        if values["schema"] != SCHEMA:
            raise ValueError(f"its schema is {values['schema']}, this version reads {SCHEMA}")
        given = {each.name: values[each.name] for each in fields(cls)}
        for name in ("name", "note", "host", "samples", "stamp"):
            check_kind(given[name], name, str)
        check_name(given["name"])
        check_note(given["note"])
        check_kind(given["when"], "when", int, float)
        if not 0 <= given["when"] < LATEST:
            raise ValueError(f"when is {given['when']!r}")
        check_kind(given["scores"], "scores", dict)
        for name, value in given["scores"].items():
            check_kind(value, f"scores.{name}", int, float)
        check_kind(given["left_out"], "left_out", list)
        for value in given["left_out"]:
            check_kind(value, "left_out", int, float)
        read = {
            "protocol": _protocol(given["protocol"]),
            "scores": {name: float(value) for name, value in given["scores"].items()},
            "left_out": tuple(map(float, given["left_out"])),
        }
        return cls(**(given | read))

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"schema": SCHEMA, **asdict(self), "left_out": list(self.left_out)}

    def path(self, runs: Path) -> Path:
        """Its file: one for each name and way of measuring, so that a score taken again replaces the one before."""
        named = digest({"name": self.name, "protocol": measured(self.protocol)})
        return runs / FOLDER / f"{named}.json"

    def publish(self, runs: Path) -> Path:
        """Writes the record beside the runs and returns its file.

        Raises:
            ValueError: it could not be read again.
        """
        text = strict_json(self.plain(), indent=1)
        OtherRecord.of(json.loads(text))
        path = self.path(runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.publish(str(path), text.encode(), replace=True)
        return path


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: no name that a board could show.
    """
    _check_text(name, "the name", NAME)
    if not name.strip():
        raise ValueError("the name is empty")


def check_note(note: str, most: int = NOTE) -> None:
    """
    Raises:
        ValueError: no note that a board could show, or one of more characters.
    """
    _check_text(note, "the note", most)


def _check_text(text: str, what: str, most: int) -> None:
    if len(text) > most:
        raise ValueError(f"{what} has {len(text)} characters, more than {most}")
    if unfit := [each for each in text if unicodedata.category(each) in _UNFIT]:
        raise ValueError(f"{what} has the control character {unfit[0]!a}")


def measured(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What a protocol says of how samples are measured; what it has no value for is left out."""
    return {name: protocol[name] for name in MEASURING if protocol.get(name) is not None}


def measuring_key(protocol: Mapping[str, Any]) -> str:
    """Stands for how a protocol measures, however it draws samples."""
    return digest(measured(protocol))


def measured_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether scores under these two protocols can be compared, however the samples were drawn."""
    return measuring_key(one) == measuring_key(other)


def other_files(runs: Path) -> list[Path]:
    """Every file of others' scores beside these runs, by name."""
    folder = runs / FOLDER
    names = sorted(names_in(folder))
    return [folder / name for name in names if name.endswith(".json") and name[0] != "."]


def read_other_file(path: Path | str) -> OtherRecord:
    """One record.

    Raises:
        OSError: the file cannot be opened.
        ValueError, RecursionError: it holds no record that this version can read.
    """
    return OtherRecord.of(json.loads(Path(path).read_text()))


def _protocol(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a protocol that say how samples are measured. Raises what `OtherRecord.of` catches."""
    check_kind(given, "protocol", dict)
    for name, kind in _REQUIRED.items():
        check_kind(given[name], f"protocol.{name}", kind)
    for name, kind in _OPTIONAL.items():
        if given.get(name) is not None:
            check_kind(given[name], f"protocol.{name}", kind)
    if not given["metric"]:
        raise ValueError("its protocol names no metric")
    if not 0 < given["samples"] < _COUNT:
        raise ValueError(f"protocol.samples is {given['samples']!r}")
    return measured(given)
