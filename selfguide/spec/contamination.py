"""Which feature nets a model had to do with before it was scored, since a score in those says less than it seems.

A net may have trained a model, or guided it through annotations made with it, or selected it among others by a score.
Where a protocol measures in such a net, models are made good at that measure, and no longer by being good: a row is
not ranked by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selfguide.spec.metrics import FEATURES

Use = Literal["trained", "guided", "selected"]
_WORDS: Mapping[Use, str] = {
    "trained": "trained by",
    "guided": "guided by",
    "selected": "selected by",
}


@dataclass(frozen=True, kw_only=True, order=True)
class NetUse:
    """What one feature net did for a model."""

    net: str
    # of its weights; "" where nobody wrote it down
    sha256: str
    use: Use

    @property
    def words(self) -> str:
        return f"{_WORDS[self.use]} {self.net}"

    @staticmethod
    def of(values: Mapping[str, Any]) -> NetUse:
        """From JSON.

        Raises:
            ValueError, KeyError: it is of another kind.
        """
        if values["use"] not in _WORDS:
            raise ValueError(f"a feature net was used as {values['use']!r}")
        return NetUse(net=str(values["net"]), sha256=str(values["sha256"]), use=values["use"])


def nets_behind(provenance: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Name and sha256 of each feature net in a sidecar's provenance, or in that of the features it was made from."""
    if "net" in provenance and provenance["net"] != "pixels":
        yield {"net": str(provenance["net"]), "sha256": str(provenance.get("sha256", ""))}
    for value in provenance.values():
        if isinstance(value, Mapping):
            yield from nets_behind(value)


def uses(
    guidance: Mapping[str, Any],
    origin: Mapping[str, Any],
    selected: Iterable[Mapping[str, str]] = (),
) -> tuple[NetUse, ...]:
    """What a snapshot's manifest says of the nets behind its guidance, and behind the weights that it began from.

    Earlier snapshots name no nets.

    Args:
        selected: name and sha256 of nets by whose scores this model was chosen among others; no manifest knows.
    """
    sidecars = guidance.get("sidecars", {}).values()
    found = {
        "guided": [net for sidecar in sidecars for net in sidecar.get("nets", ())],
        "trained": origin.get("nets", ()),
        "selected": selected,
    }
    return tuple(
        sorted({NetUse.of({**net, "use": use}) for use, nets in found.items() for net in nets})
    )


def trained_by(
    guidance: Mapping[str, Any],
    origin: Mapping[str, Any],
    selected: Iterable[Mapping[str, str]] = (),
) -> list[dict[str, str]]:
    """Name and sha256 of the nets that had to do with weights, for the record of what begins from them."""
    named = {(use.net, use.sha256) for use in uses(guidance, origin, selected)}
    return [{"net": net, "sha256": sha256} for net, sha256 in sorted(named)]


def contaminations(
    protocol: Mapping[str, Any], nets: Iterable[NetUse] | None, metric: str | None = None
) -> tuple[NetUse, ...]:
    """Those uses whose net a protocol measures in: by the sha256 of its weights, or by its name.

    Args:
        metric: the score that is looked at, by default the protocol's own; the ratio is measured in further nets.
    """
    measured_in = {
        str(protocol.get("net") or protocol.get("metric")): str(protocol.get("feature_sha256"))
    }
    if metric == "fdr":
        measured_in |= (protocol.get("extras") or {}).get("fdr", {}).get("nets", {})
    return tuple(
        use
        for use in nets or ()
        if (use.sha256 and use.sha256 in measured_in.values())
        or any(_names(use.net, use.sha256) & _names(*each) for each in measured_in.items())
    )


def _names(net: str, sha256: str) -> set[str]:
    """What a net is called: the same weights are published in files of several kinds, under several names."""
    of_protocols = [
        features.nets
        for protocol, features in FEATURES.items()
        if net in (protocol, *features.nets) or (sha256 and sha256 == features.sha256)
    ]
    # a protocol's name is none of a net: that of digits has measured in several
    return {net}.union(*of_protocols) - FEATURES.keys()
