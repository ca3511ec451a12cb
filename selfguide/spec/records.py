"""Evaluation records: a score is a named protocol, not a number.

One immutable JSON file per evaluation attempt, `evals/<key>.<attempt>.json`. The key names the snapshot and the
protocol, which is known before the job from the run's config and the snapshot's manifest. So a score is never taken
twice, and two protocols never share a column.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, EvaluationConfig
from selfguide.spec.config.path import read_by_sampling
from selfguide.spec.config.sampler import protocol_settings
from selfguide.spec.contamination import NetUse, contaminations
from selfguide.spec.extras import extras
from selfguide.spec.identity import digest
from selfguide.spec.metrics import FEATURES
from selfguide.spec.run import RunFolder, image_folder, write_record
from selfguide.spec.sizes import architecture

log = logging.getLogger(__name__)

# what a file that is no record of ours raises, whichever way it is broken
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)

# of the record
SCHEMA = 1
# begins what a protocol calls a reference that is a file
_FILE = "file "


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything a score depends on besides the weights."""

    metric: str
    # of the metric's code
    version: int
    feature_sha256: str
    resize: str
    quantisation: str
    # manifest hash of the reference images
    reference: str
    samples: int
    # how conditions are drawn: "empirical p(k)", or as it is otherwise
    labels: str
    seed: int
    sampler: str
    # None for an adaptive sampler, which has the two below instead
    steps: int | None
    # rtol and atol
    tolerance: tuple[float, float] | None
    # of an adaptive sampler, whose step control is global to the batch, and of protocols of images
    batch: int | None
    g: float
    interval: tuple[float, float]
    # which average, by its key
    ema: int | str
    dtype: str
    # `protocol_settings` of the sampler
    settings: dict[str, Any] = field(default_factory=dict)
    # of protocols of images; elsewhere they are no part of the key
    normalisation: str | None = None
    # the model of timm that fd_timm names
    net: str | None = None
    # of the autoencoder that makes images of latents
    decoder_sha256: str | None = None
    # of a reference that is a file; None where it was not there when the score was asked for
    reference_sha256: str | None = None
    # of the reference's shards: so many images, by this seed or else the first, and the window that is cut out of each
    reference_count: int | None = None
    reference_seed: int | None = None
    crop: str | None = None
    # of so many samples each
    sets: int | None = None
    # what is measured beside, with its settings
    extras: dict[str, Any] | None = None

    @staticmethod
    def of(config: Config, snapshot: Mapping[str, Any]) -> Protocol:
        """How `config` scores a snapshot with this manifest (its `data` and `guidance` are read)."""
        if config.evaluation.protocol == "probe":
            return _probe(config, snapshot)
        evaluation, sampler = config.evaluation, config.sampler
        features, adaptive = FEATURES[evaluation.protocol], sampler.name == "dopri5"
        data, header = snapshot["data"], snapshot["data"].get("header", {})
        return Protocol(
            **measuring(evaluation, data["manifest"]),
            labels=label_policy(snapshot["guidance"], evaluation.prior),
            seed=evaluation.seed,
            sampler=sampler.name,
            steps=None if adaptive else sampler.steps,
            tolerance=(sampler.rtol, sampler.atol) if adaptive else None,
            batch=evaluation.batch if adaptive or features.of_images else None,
            g=sampler.g,
            interval=sampler.interval,
            ema=averages_of(config)[evaluation.average].plain,
            dtype=features.dtype,
            settings=protocol_settings(sampler) | read_by_sampling(config.path),
            decoder_sha256=header.get("encoder_sha256") if features.of_images else None,
            sets=evaluation.sets if evaluation.sets > 1 else None,
        )

    def plain(self) -> dict[str, Any]:
        """As a record holds it: what only protocols of images have is left out of others."""
        values = {name: getattr(self, name) for name in _OF_PROTOCOL}
        for later in (
            "normalisation", "net", "decoder_sha256", "reference_sha256", "reference_count", "reference_seed", "crop",
            "sets", "extras",
        ):  # fmt: skip
            if values[later] is None:
                del values[later]
        return values

    @functools.cached_property
    def key(self) -> str:
        """What a column of scores is headed by; no settings leave no trace, so plain samplers keep their column."""
        return _key_of(self.plain())


def measuring(evaluation: EvaluationConfig, manifest: str) -> dict[str, Any]:
    """What a protocol says of how samples are measured, whoever drew them; the rest says how they are drawn.

    Args:
        manifest: hash of the shards that samples are compared with where `evaluation` names no others.
    """
    features = FEATURES[evaluation.protocol]
    of_images = features.of_images
    return {
        "metric": evaluation.protocol,
        "version": features.version,
        "feature_sha256": (evaluation.sha256 or features.sha256).lower(),
        "resize": features.resize,
        "quantisation": features.quantisation,
        "normalisation": features.normalisation or None,
        "net": evaluation.net,
        "reference": _reference(evaluation, manifest) if of_images else manifest,
        "reference_sha256": evaluation.reference_sha256 if of_images else None,
        "reference_count": evaluation.reference_count,
        "reference_seed": evaluation.reference_seed,
        "crop": crop_rule(evaluation),
        "samples": evaluation.samples,
        "extras": (extras(evaluation) or None) if of_images else None,
    }


def _key_of(protocol: Mapping[str, Any]) -> str:
    """The key of a protocol, as a record holds it."""
    values = dict(protocol)
    if values.get("g") == 1:  # nothing is guided, wherever
        values["interval"] = (0.0, 1.0)
    if not values.get("settings"):
        values.pop("settings", None)
    return digest(values)


def _probe(config: Config, snapshot: Mapping[str, Any]) -> Protocol:
    """How linear and k-NN probes read a snapshot: no image is sampled, so nothing is said of how."""
    evaluation, features = config.evaluation, FEATURES["probe"]
    layers = [layer_name(config, layer) for layer in evaluation.layers]
    test = evaluation.manifest or "a fifth of them"
    return Protocol(
        metric=features.score,
        version=features.version,
        feature_sha256=features.sha256,
        resize=features.resize,
        quantisation=features.quantisation,
        reference=snapshot["data"]["manifest"],
        samples=evaluation.samples,
        labels="no condition",
        seed=evaluation.seed,
        sampler="none",
        steps=None,
        tolerance=None,
        batch=evaluation.batch,
        g=1.0,
        interval=(0.0, 1.0),
        ema=averages_of(config)[evaluation.average].plain,
        dtype=features.dtype,
        settings={
            "layers": layers or "all",
            "noise_times": list(evaluation.noise_times),
            "pooling": evaluation.pooling,
            "passes": evaluation.passes,
            "learning_rate": evaluation.learning_rate,
            "test": test,
        },
    )


def layer_name(config: Config, given: str) -> str:
    """The name of a layer that is given by number or by name.

    Raises:
        UserError: the network has no such layer.
    """
    return architecture(config).layer_of(given, "evaluation.layers").name


def _reference(evaluation: EvaluationConfig, manifest: str) -> str:
    """What samples are compared with: a file by its name, beside its sha256; shards by their manifest."""
    if evaluation.reference:
        return f"{_FILE}{Path(evaluation.reference).name}"
    return evaluation.manifest or manifest


def crop_rule(evaluation: EvaluationConfig) -> str | None:
    """How windows are cut out of the reference's images, in words; None where images are whole."""
    if evaluation.crop is None:
        return None
    seed = f", seed {evaluation.crop_seed}" if evaluation.crop_rule == "random" else ""
    return f"{evaluation.crop_rule}, {evaluation.crop} by {evaluation.crop}{seed}"


def from_training_rows(guidance: Mapping[str, Any]) -> bool:
    """Whether conditions are those of training images, rather than one group: layouts, features, several groups.

    `guidance` is what a snapshot's manifest holds of its guidance.
    """
    kinds = {field: about["kind"] for field, about in guidance.get("sidecars", {}).items()}
    return guidance.get("level") == "patch" or (bool(kinds) and kinds != {"ids": "id"})


def label_policy(guidance: Mapping[str, Any], prior: str) -> str:
    """How conditions are drawn, in words: scores under different policies are different scores."""
    if from_training_rows(guidance):
        return "training rows"
    if prior == "quota":
        # of labels that is a use of them, which such a snapshot says of itself
        what = "human class" if guidance.get("source") == "labels" else "group"
        return f"equally many of each {what}"
    return "empirical p(k)" if prior == "empirical" else "uniform over groups"


def record_key(images: int, protocol: Protocol) -> str:
    """Names the score of one snapshot under one protocol."""
    return f"{image_folder(images)}-{protocol.key}"


def record_path(run: RunFolder, key: str, attempt: int) -> Path:
    """Where an attempt at the score of this key (`record_key`) leaves its record."""
    return run.evals / f"{key}.{attempt}.json"


def grid_path(run: RunFolder, key: str, attempt: int) -> Path:
    """The PNG of sample images that belongs to a record."""
    return run.evals / f"{key}.{attempt}.png"


# of evaluations that are not over: hidden folders of finished parts, one for each block of samples; of a probe the end
# of the name of what a pass leaves
PARTS, PART, PASS = ".parts", "features-", ".pt"
# beside the runs of all experiments: statistics of real images, each made once, in a folder of its own
REFERENCES, REFERENCE = ".references", "reference.npz"


def parts_path(run: RunFolder, key: str, snapshot_sha256: str) -> Path:
    """The folder of an evaluation's finished parts, from which its next try goes on."""
    return run.evals / PARTS / f"{key}-{snapshot_sha256[:12]}"


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What one evaluation attempt of one snapshot came to; written once.

    Earlier records have no protocol where the job failed, and then an empty `protocol_key`.
    """

    # skipped: nothing was tried, and `message` says why
    status: Literal["done", "failed", "skipped"]
    key: str
    attempt: int
    # seen when the snapshot was published
    images: int
    # whether that is the run's last snapshot
    final: bool = False
    run: str = ""
    experiment: str = ""
    seed: int = 0
    protocol_key: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    # finite ones only: a missing score and NaN are the same to a reader
    scores: Mapping[str, float] = field(default_factory=dict)
    # network evaluations a sample
    nfe: float | None = None
    label_free: bool = False
    # sha256 of the weights
    snapshot_sha256: str = ""
    # sha256 of the other files that were read: of the reference, where it is a file
    files: Mapping[str, str] = field(default_factory=dict)
    # the score without each block of its jackknife in turn: two of one seed make a paired difference
    left_out: tuple[float, ...] = ()
    # of the sweep that asked for it, where the run's own protocol is another
    sweep: str = ""
    # seconds since 1970
    started: float | None = None
    ended: float | None = None
    # that the evaluation took
    seconds: float | None = None
    host: str = ""
    pid: int | None = None
    # why it failed, and the last lines of its log
    message: str = ""
    log: str = ""
    # seconds since 1970, when the record was written
    time: float = 0.0
    # feature nets that trained, guided or selected the model; None where there are none, or nobody wrote them down
    nets: tuple[NetUse, ...] | None = None
    # of a probe: its table of layers and noise-times, as `selfguide.evaluation.probe` makes it
    probe: Mapping[str, Any] | None = None

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def metric(self) -> str | None:
        """The score that the protocol is named after."""
        return self.protocol.get("metric")

    @property
    def score(self) -> float | None:
        return self.scores.get(self.metric) if self.metric else None

    @property
    def asked(self) -> str:
        """Key of the protocol that it was asked for by: another one where that named a file whose content was open."""
        return self.key.rpartition("-")[2]

    @property
    def contaminations(self) -> tuple[NetUse, ...]:
        """What the net that this score is measured in did for the model before."""
        return contaminations(self.protocol, self.nets)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> EvaluationRecord:
        """From a record's JSON.

        Raises:
            ValueError, KeyError, TypeError: it is of another schema, or is no record.
        """
        if values["schema"] != SCHEMA:
            raise ValueError(f"its schema is {values['schema']}, this version reads {SCHEMA}")
        given = {k: v for k, v in values.items() if k in _OF_RECORD and v is not None}
        _check_kinds(given)
        given |= _by_content(given)
        scores = given.get("scores", {}) if values["status"] == "done" else {}
        finite = {n: float(v) for n, v in scores.items() if v is not None and math.isfinite(v)}
        numbers = {"attempt": int(values["attempt"]), "images": int(values["images"])}
        nets = tuple(map(NetUse.of, given["nets"])) if "nets" in given else None
        # without one of them the rest says nothing of the error
        blocks = given.get("left_out", ())
        left_out = tuple(map(float, blocks)) if all(map(_measured, blocks)) else ()
        read = {"scores": finite, "nets": nets, "left_out": left_out}
        found = cls(**(given | numbers | read))
        if found.status not in ("done", "failed", "skipped") or (
            found.done and not found.protocol_key
        ):
            raise ValueError(
                f"a record with status {found.status!r} and protocol key {found.protocol_key!r}"
            )
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON holds it; what is unknown is left out."""
        empty = {name for name in ("files", "left_out") if not getattr(self, name)}
        unknown = {"time", *empty}
        values = {k: v for k, v in asdict(self).items() if v not in (None, "") and k not in unknown}
        return {"schema": SCHEMA, **values}

    def publish(self, run: RunFolder) -> None:
        """Writes the record, once.

        Raises:
            FileExistsError: this attempt has one.
        """
        write_record(record_path(run, self.key, self.attempt), self.plain())

    def grid(self, run: RunFolder) -> Path | None:
        """The picture of its samples, where there is one."""
        path = grid_path(run, self.key, self.attempt)
        return path if path.is_file() else None


def _by_content(given: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of a record, and its key, where the files that it names were not known by their content before.

    They were not there when the score was asked for, or an earlier version asked. Files of one name may differ, and
    scores against the same one share a column, whenever it came.
    """
    protocol, files = given.get("protocol", {}), given.get("files", {})
    known = {}
    named = str(protocol.get("reference")).startswith(_FILE)
    if named and "reference" in files and protocol.get("reference_sha256") is None:
        known["reference_sha256"] = files["reference"]
    beside = protocol.get("extras") or {}
    ufid = beside.get("ufid")
    if ufid is not None and "unconditional" in files and "sha256" not in ufid:
        known["extras"] = {**beside, "ufid": {**ufid, "sha256": files["unconditional"]}}
    if not known:
        return {}
    protocol = {**protocol, **known}
    return {"protocol": protocol, "protocol_key": _key_of(protocol)}


# of both, asked for of every record
_OF_PROTOCOL = tuple(each.name for each in fields(Protocol))
_OF_RECORD = tuple(each.name for each in fields(EvaluationRecord))


# of a score: what is finite and beyond it was never measured, and differences and axes would not be finite
LARGEST = 1e100
# of whole numbers: seeds have 64 bits, and counts of images and attempts stand in columns of signed ones
_WHOLE, _COUNT = 2**64, 2**63
# characters of a key, of which the names of files are made
_KEY = 200
# seconds since 1970 at the end of the last year that calendars can show
LATEST = 253_402_300_800

# what values of a record, and of its protocol, are in JSON, where true is no number; others are not looked at
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("status", "key", "run", "experiment", "protocol_key"), (str,)),
    **dict.fromkeys(("snapshot_sha256", "host", "message", "log"), (str,)),
    **dict.fromkeys(("attempt", "images", "seed"), (int,)),
    **dict.fromkeys(("nfe", "started", "ended", "seconds", "time"), (int, float)),
    **dict.fromkeys(("final", "label_free"), (bool,)),
    **dict.fromkeys(("protocol", "scores", "files"), (dict,)),
    **dict.fromkeys(("nets", "left_out"), (list,)),
    "sweep": (str,),
}
_PROTOCOL_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("metric", "sampler", "reference", "labels", "feature_sha256"), (str,)),
    **dict.fromkeys(("version", "samples", "seed", "steps"), (int,)),
    "g": (int, float),
    "interval": (list, tuple),
    "settings": (dict,),
}
# of a protocol, what readers reckon with: where one has it, it has a value
_HAVE_A_VALUE = ("metric", "sampler", "g", "interval", "settings")


def _check_kinds(given: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError for a value that readers could not reckon with."""
    _check_each(given, _KINDS, "")
    for name in ("time", "started", "ended"):
        if not 0 <= (given.get(name) or 0) < LATEST:
            raise ValueError(f"{name} is {given[name]!r}")
    for name in ("images", "attempt"):
        check_kind(given.get(name), name, int)
        if not 0 <= given[name] < _COUNT:
            raise ValueError(f"{name} is {given[name]!r}")
    for name in ("nfe", "seconds"):
        if (given.get(name) or 0) < 0:
            raise ValueError(f"{name} is {given[name]!r}")
    if "/" in given["key"] or "\0" in given["key"] or len(given["key"]) > _KEY:
        raise ValueError(f"key is {given['key'][:_KEY]!r}, which names no file")
    if given["status"] == "done" and not given.get("protocol", {}).get("metric"):
        raise ValueError("its protocol names no metric")
    _check_protocol(given.get("protocol", {}))
    for name, value in given.get("scores", {}).items():
        if value is not None and type(value) not in (int, float):
            raise TypeError(f"scores.{name} is {value!r}")
        if value is not None and LARGEST < abs(value) < math.inf:
            raise ValueError(f"scores.{name} is {value!r}")
    blocks = given.get("left_out", ())
    # what was not finite is written as null
    if any(type(value) not in (int, float, type(None)) for value in blocks):
        raise TypeError(f"left_out is {blocks!r}")


def _check_protocol(protocol: Mapping[str, Any]) -> None:
    _check_each(protocol, _PROTOCOL_KINDS, "protocol.")
    for name in _HAVE_A_VALUE:
        if protocol.get(name, 0) is None:
            raise TypeError(f"protocol.{name} is None")
    for name in ("interval", "tolerance"):
        pair = protocol.get(name) or (0.0, 1.0)
        _check_finite(pair, f"protocol.{name}")
        if len(pair) != 2:
            raise ValueError(f"protocol.{name} is {pair!r}")
    # of probes
    _check_finite(protocol.get("settings", {}).get("noise_times", ()), "protocol.noise_times")


def _check_finite(values: Any, where: str) -> None:
    """Raises TypeError or ValueError for what is no list of finite numbers."""
    if type(values) not in (list, tuple) or any(type(v) not in (int, float) for v in values):
        raise TypeError(f"{where} is {values!r}")
    if not all(map(_measured, values)):
        raise ValueError(f"{where} is {values!r}")


def _measured(value: float | None) -> bool:
    """Whether it is a finite number, and no larger than what was ever measured."""
    return value is not None and abs(value) <= LARGEST


def _check_each(
    given: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str
) -> None:
    for name, value in given.items():
        if value is not None and name in kinds:
            check_kind(value, f"{where}{name}", *kinds[name])


def check_kind(value: Any, where: str, *kinds: type) -> None:
    """
    Raises:
        TypeError, ValueError: `value` is of none of these kinds, or a number that readers could not reckon with.
    """
    kind = type(value)
    if kind not in kinds:
        raise TypeError(f"{where} is {value!r}")
    if (kind is float and not _measured(value)) or (kind is int and abs(value) >= _WHOLE):
        raise ValueError(f"{where} is {value!r}")


def record_files(run: RunFolder) -> list[Path]:
    """Every evaluation record of the run, by name."""
    return sorted(run.evals.glob("img-*.json"))


def read_record_file(path: Path) -> EvaluationRecord:
    """One record. Raises OSError, or what `EvaluationRecord.of` raises."""
    return EvaluationRecord.of(json.loads(path.read_text()))


def scored(run: RunFolder, key: str) -> bool:
    """Whether a record of this key holds a score."""
    return any(each.done for each in records_of(run, key))


def records_of(run: RunFolder, key: str) -> Iterator[EvaluationRecord]:
    """The records of one key; a warning names each file that holds none."""
    return _read(sorted(run.evals.glob(f"{key}.*.json")))


def records(run: RunFolder) -> Iterator[EvaluationRecord]:
    """Every evaluation record of the run that this version can read, by name; a warning names each other file."""
    return _read(record_files(run))


def _read(paths: Iterable[Path]) -> Iterator[EvaluationRecord]:
    for path in paths:
        try:
            found = read_record_file(path)
        except UNREADABLE as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            log.warning(f"{path} is no evaluation record, and is left out: {why}")
        else:
            yield found
