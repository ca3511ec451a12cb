"""Compare two data sets: header, counts, statistics, hashes of shards, and keys.

The exit code is 0 if they are the same bytes, and 1 if anything differs.

example:
  python -m tools.shards diff data/digits s3://bucket/digits
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np

from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from tools import flags
from tools.shards.inspect import keys_of

FACTS = (
    "count",
    "layout",
    "decode",
    "block",
    "fields",
    "header",
    "statistics",
    "label_histogram",
    "source",
    "seed",
)
_SHOWN = 5


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("a A", str, None, "folder or s3:// prefix of one data set"),
        ("b B", str, None, "folder or s3:// prefix of the other"),
        flags.JSON,
    )


def run(options: argparse.Namespace) -> int:
    a, b = manifests.load(options.a), manifests.load(options.b)
    found = {"same": a.hash == b.hash, "manifests": [a.hash, b.hash]}
    if not found["same"]:
        found |= {"facts": _facts(a, b), "shards": _shards(a, b)}
        found["keys"] = _keys(options.a, a, options.b, b)
    if options.json:
        print(json.dumps({"a": options.a, "b": options.b, **found}))
    else:
        _print(found)
    return 0 if found["same"] else 1


def _facts(a: Manifest, b: Manifest) -> dict[str, list[Any]]:
    pairs = {n: [a.plain.get(n), b.plain.get(n)] for n in FACTS}
    flat: dict[str, list[Any]] = {}
    for name, (one, other) in pairs.items():
        if isinstance(one, dict) and isinstance(other, dict):
            names = dict.fromkeys([*one, *other])
            flat |= {f"{name}.{n}": [one.get(n), other.get(n)] for n in names}
        else:
            flat[name] = [one, other]
    return {n: pair for n, pair in flat.items() if pair[0] != pair[1]}


def _shards(a: Manifest, b: Manifest) -> dict[str, int]:
    ones, others = ({s.sha256 for s in m.shards} for m in (a, b))
    return {"both": len(ones & others), "only_a": len(ones - others), "only_b": len(others - ones)}


def _keys(a_root: str, a: Manifest, b_root: str, b: Manifest) -> dict[str, Any]:
    ones, others = (np.concatenate([*keys_of(root, m)]) for root, m in ((a_root, a), (b_root, b)))
    only_a, only_b = np.setdiff1d(ones, others), np.setdiff1d(others, ones)
    return {
        "both": len(ones) - len(only_a),
        "only_a": len(only_a),
        "only_b": len(only_b),
        "same_order": bool(np.array_equal(ones, others)),
        "some_only_a": only_a[:_SHOWN].tolist(),
        "some_only_b": only_b[:_SHOWN].tolist(),
    }


def _print(found: dict[str, Any]) -> None:
    one, other = (hash_[:12] for hash_ in found["manifests"])
    if found["same"]:
        print(f"the same data set, manifest {one}")
        return
    print(f"manifests differ: {one} and {other}")
    for name, (a, b) in found["facts"].items():
        print(f"{name}: {_short(a)} and {_short(b)}")
    s, k = found["shards"], found["keys"]
    print(
        f"shards: {s['both']} in both, {s['only_a']} only in the first, {s['only_b']} in the second"
    )
    order = "in the same order" if k["same_order"] else "in another order or number"
    print(
        f"keys: {k['both']:,} in both, {order}; {k['only_a']:,} only in the first "
        f"{k['some_only_a'] or ''}, {k['only_b']:,} in the second {k['some_only_b'] or ''}".rstrip()
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
