"""Feature nets that had to do with a model: named in its snapshots and records, and never what ranks it."""

import json
from pathlib import Path

import pytest

from selfguide.spec.contamination import NetUse, contaminations, nets_behind, trained_by, uses
from selfguide.spec.metrics import FEATURES
from selfguide.spec.records import SCHEMA, EvaluationRecord, read_record_file, record_path
from selfguide.spec.run import RunFolder

DINO = {"net": "vit_base_patch16_224.dino", "sha256": "d1" * 32}
INCEPTION = {"net": "inception", "sha256": "1c" * 32}
GUIDED = {"sidecars": {"ids": {"folder": "a", "kind": "id", "sha256": "0", "nets": [DINO]}}}


def test_the_nets_behind_a_sidecar_are_found_however_deep_its_provenance_lies() -> None:
    provenance = {
        "method": "kmeans",
        "saw_labels": False,
        "features": {**DINO, "pooling": "cls", "rows_sha256": "7", "of": dict(INCEPTION)},
    }
    assert list(nets_behind(provenance)) == [DINO, INCEPTION]
    assert list(nets_behind({"net": "pixels", "saw_labels": False})) == []
    # random weights have no sha256
    assert list(nets_behind({"net": "a", "random_seed": 0})) == [{"net": "a", "sha256": ""}]


def test_uses_are_what_the_manifest_says_of_guidance_and_of_where_weights_began() -> None:
    began = {"source": "snapshot", "nets": [INCEPTION]}
    found = uses(GUIDED, began, selected=[DINO])
    assert found == tuple(
        sorted(
            [
                NetUse(**DINO, use="guided"),
                NetUse(**INCEPTION, use="trained"),
                NetUse(**DINO, use="selected"),
            ]
        )
    )
    assert trained_by(GUIDED, began) == [INCEPTION, DINO]
    # manifests of before
    old = {"sidecars": {"ids": {"folder": "a", "kind": "id", "sha256": "0"}}}
    assert uses(old, {"source": "scratch"}) == uses({"source": "online"}, {}) == ()


def test_a_score_is_contaminated_by_the_net_it_is_measured_in_and_by_no_other() -> None:
    nets = uses(GUIDED, {"nets": [INCEPTION]})
    assert contaminations({"feature_sha256": DINO["sha256"]}, nets) == (
        NetUse(**DINO, use="guided"),
    )
    # the same net from another file is known by its name
    other_file = {"feature_sha256": "ff" * 32, "net": DINO["net"]}
    assert [use.net for use in contaminations(other_file, nets)] == [DINO["net"]]
    assert contaminations({"feature_sha256": "ff" * 32, "net": None}, nets) == ()
    assert contaminations({"feature_sha256": ""}, [NetUse(net="a", sha256="", use="guided")]) == ()
    assert contaminations({"feature_sha256": DINO["sha256"]}, None) == ()


def test_a_score_is_contaminated_by_its_net_from_a_file_of_another_kind() -> None:
    of_hub = {"metric": "fdd", "feature_sha256": FEATURES["fdd"].sha256}
    by_timm = NetUse(net="vit_large_patch14_dinov2.lvd142m", sha256="7a" * 32, use="guided")
    assert contaminations(of_hub, [by_timm]) == (by_timm,)
    # and the other way round, where a score in the one chose, which is named after its protocol
    chosen = NetUse(net="fdd", sha256=FEATURES["fdd"].sha256, use="selected")
    of_timm = {"metric": "fd_timm", "feature_sha256": "7a" * 32, "net": by_timm.net}
    assert contaminations(of_timm, [chosen]) == (chosen,)
    other = NetUse(net="vit_base_patch14_dinov2.lvd142m", sha256="8b" * 32, use="guided")
    assert contaminations(of_hub, [other]) == contaminations(of_timm, [other]) == ()


def test_a_protocol_of_new_weights_is_not_contaminated_by_those_of_before() -> None:
    before = NetUse(net="fd_digits", sha256="0d" * 32, use="selected")
    protocol = {"metric": "fd_digits", "feature_sha256": FEATURES["fd_digits"].sha256}
    assert contaminations(protocol, [before]) == ()


def test_the_ratio_is_contaminated_by_each_of_its_nets_and_the_protocol_s_own_score_is_not() -> (
    None
):
    extras = {"fdr": {"test": "t", "nets": {"fid_clean": FEATURES["fid_clean"].sha256}}}
    protocol = {"metric": "fdd", "feature_sha256": FEATURES["fdd"].sha256, "extras": extras}
    chosen = NetUse(net="fid_adm", sha256=FEATURES["fid_adm"].sha256, use="selected")
    assert contaminations(protocol, [chosen], "fdr") == (chosen,)
    assert contaminations(protocol, [chosen]) == contaminations(protocol, [chosen], "fdd") == ()
    of_fdd = NetUse(net="fdd", sha256=FEATURES["fdd"].sha256, use="selected")
    assert contaminations(protocol, [of_fdd], "fdr") == (of_fdd,)
    # of records of before the ratio
    assert contaminations({**protocol, "extras": None}, [chosen], "fdr") == ()


def test_a_record_keeps_its_nets_and_one_of_before_has_none(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    nets = uses(GUIDED, {})
    said = {"status": "done", "attempt": 1, "images": 5, "protocol_key": "p"}
    protocol = {"metric": "fdd", "feature_sha256": DINO["sha256"]}
    for key, given in (("img-1", nets), ("img-2", None)):
        EvaluationRecord(key=key, nets=given, protocol=protocol, **said).publish(run)
        found = read_record_file(record_path(run, key, 1))
        assert found.nets == given and found.contaminations == (given or ())
    assert "nets" not in json.loads(record_path(run, "img-2", 1).read_text())
    with pytest.raises((ValueError, KeyError, TypeError)):
        EvaluationRecord.of({"schema": SCHEMA, "key": "k", **said, "nets": [{"net": "a"}]})
