"""What a protocol of images measures beside its own score, and what each of these numbers hangs on. No torch.

A name in `evaluation.metrics` and its settings are part of the protocol, and so of its key; a protocol without any has
the key it always had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfguide.spec.config import Config, SidecarGuidance
from selfguide.spec.config.evaluation import EvaluationConfig
from selfguide.spec.config.laws import fields_of
from selfguide.spec.metrics import FEATURES
from selfguide.spec.suggest import nearest
from selfguide.spec.weight_files import INCEPTION
from shards.errors import UserError

# of `evaluation=`, by the name under which a protocol holds them
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "inception_score": {"splits": "is_splits", "seed": "is_seed"},
    "precision_recall": {"k": "pr_k", "sizes": "pr_sizes", "strict": "pr_strict", "kept": "kept"},
    "kid": {"subsets": "kid_subsets", "size": "kid_size", "seed": "kid_seed", "kept": "kept"},
    "density_coverage": {"k": "dc_k", "kept": "kept"},
    "near_copies": {"quantile": "copies_quantile", "kept": "kept"},
    "ood_auroc": {"kept": "kept"},
    "fdr": {},
    "ufid": {},
    "cluster_fd": {"least": "cluster_least", "kept": "kept"},
    "agreement": {"kept": "kept"},
    "drift": {"blocks": "drift_blocks"},
}
# ADM's evaluator takes these two of every set (Dhariwal and Nichol 2021)
BUILT_IN = ("inception_score", "precision_recall")
# need a model, beside its samples
OF_MODELS = ("cluster_fd", "agreement", "drift")
# compare with the training images, whatever the reference is
OF_TRAINING = ("near_copies", "ood_auroc", "cluster_fd")
# need images that nobody trained on
OF_TEST = ("ood_auroc", "fdr")


def measured(evaluation: EvaluationConfig) -> tuple[str, ...]:
    """Every metric beside the protocol's own score, in the order of `SETTINGS`."""
    own = BUILT_IN if evaluation.protocol == "fid_adm" else ()
    return tuple(name for name in SETTINGS if name in own or name in evaluation.metrics)


def extras(evaluation: EvaluationConfig) -> dict[str, Any]:
    """Name and settings of what is measured, less what the protocol has always had at the settings it had."""
    defaults = {each.name: each.default for each in fields_of(EvaluationConfig)}
    found = {}
    for name in measured(evaluation):
        values = {key: getattr(evaluation, field) for key, field in SETTINGS[name].items()}
        changed = any(getattr(evaluation, f) != defaults[f] for f in SETTINGS[name].values())
        if evaluation.protocol == "fid_adm" and name in BUILT_IN and not changed:
            continue
        if name == "cluster_fd" and evaluation.cluster_count is not None:
            values["count"] = evaluation.cluster_count
        if name in OF_TEST:
            values["test"] = evaluation.test_manifest or evaluation.test
        if name == "fdr":
            values["nets"] = {p: FEATURES[p].sha256 for p in sorted(evaluation.fdr_protocols)}
        if name == "ufid":
            values["unconditional"] = f"file {Path(str(evaluation.unconditional)).name}"
            # where it was there already; else the record says which file it was
            if evaluation.unconditional_sha256 is not None:
                values["sha256"] = evaluation.unconditional_sha256
        if name == "agreement":
            # of the labels: the model has seen none of them by this
            values["labels"] = "for reporting only"
        found[name] = values
    return found


def check_extras(config: Config) -> None:
    """Returns when every metric of a protocol of images has what it needs.

    Raises:
        UserError: the first that lacks something; names the field, the value and the cure.
    """
    evaluation = config.evaluation
    check_sets(evaluation)
    given = evaluation.reference
    for field, neutral in (("reference_count", None), ("crop", None)):
        value = getattr(evaluation, field)
        if given and value != neutral:
            raise UserError(
                f"evaluation.{field}={value} and evaluation.reference={given}: statistics in a file are of the images "
                f"that they were made of; drop evaluation.{field}, or give evaluation.shards=ROOT in place of the file"
            )
    if given and evaluation.fdr_protocols:
        raise UserError(
            f"evaluation.fdr_protocols={list(evaluation.fdr_protocols)} and evaluation.reference={given}: a file holds "
            "statistics in one net; give evaluation.shards=ROOT in its place, or drop evaluation.fdr_protocols"
        )
    if "cluster_fd" in evaluation.metrics:
        _check_clusters(config)
    if "agreement" in evaluation.metrics and not config.guidance.one_group:
        raise UserError(
            f"evaluation.metrics={list(evaluation.metrics)}: agreement compares an image's group with its label, and "
            f"with guidance.source={config.guidance.source} an image has no group of its own; leave it out"
        )
    if "agreement" in evaluation.metrics and config.data.classes < 1:
        raise UserError(
            f"evaluation.metrics={list(evaluation.metrics)}: agreement compares groups with labels, and "
            f"data.classes={config.data.classes}; give data.classes=... if the shards have labels, else leave it out"
        )


def _check_clusters(config: Config) -> None:
    """The same of a Frechet distance within clusters."""
    evaluation, guidance = config.evaluation, config.guidance
    given = f"evaluation.metrics={list(evaluation.metrics)}: cluster_fd"
    count = evaluation.cluster_count
    if guidance.one_group:
        if count is not None:
            raise UserError(
                f"evaluation.cluster_count={count} and guidance.source={guidance.source}: an image has a group of its "
                "own there; drop it"
            )
        return
    if not (guidance.learns_online or isinstance(guidance, SidecarGuidance)):
        raise UserError(
            f"{given} compares the images of each group, and with guidance.source={guidance.source} an image is not "
            "conditioned on one group alone, nor on a row; leave it out"
        )
    grouped = isinstance(guidance, SidecarGuidance) and guidance.ids is not None
    if count is None and not grouped:
        raise UserError(
            f"{given} compares the images of each cluster, and with guidance.source={guidance.source} an image is "
            "conditioned on a row of its own; give evaluation.cluster_count=100, the number of clusters that k-means "
            "makes of these, or leave it out"
        )
    if count is not None and count > evaluation.kept:
        raise UserError(
            f"evaluation.cluster_count={count} clusters of evaluation.kept={evaluation.kept} images; give fewer"
        )


def check_sets(evaluation: EvaluationConfig) -> None:
    """The same of what a command measures, which knows no model."""
    metrics = evaluation.metrics
    if "inception_score" in metrics and FEATURES[evaluation.protocol].weights is not INCEPTION:
        raise UserError(
            f"evaluation.metrics={list(metrics)}: inception_score needs Inception's classes, and "
            f"evaluation.protocol={evaluation.protocol} measures in another net; take evaluation=fid_adm or "
            "evaluation=fid_clean, or leave it out"
        )
    if "kid" in metrics and evaluation.kid_size > evaluation.samples:
        raise UserError(
            f"evaluation.kid_size={evaluation.kid_size} images are a subset of evaluation.samples="
            f"{evaluation.samples}; give evaluation.kid_size={evaluation.samples} or fewer"
        )
    for name in OF_TEST:
        if name in metrics and evaluation.test is None:
            raise UserError(
                f"evaluation.metrics={list(metrics)}: {name} compares with images that nobody trained on; give "
                "evaluation.test=ROOT, their shards"
            )
    if "ufid" in metrics and evaluation.unconditional is None:
        raise UserError(
            f"evaluation.metrics={list(metrics)}: ufid compares with samples of an unconditional run; give "
            "evaluation.unconditional=FILE.npz, which `python -m tools.reference samples RUN "
            f"--protocol {evaluation.protocol} --out FILE.npz` makes"
        )
    known = [p for p, features in FEATURES.items() if features.weights is not None]
    for name in evaluation.fdr_protocols:
        if name not in known or name == evaluation.protocol:
            raise UserError(
                f"evaluation.fdr_protocols={list(evaluation.fdr_protocols)}: {name} is "
                f"{'this protocol itself' if name == evaluation.protocol else 'no protocol with a net of its own'}"
                f"{nearest(name, known)}; known: {', '.join(p for p in known if p != evaluation.protocol)}"
            )
    for field in ("kept", "reference_count"):
        value = getattr(evaluation, field)
        if value is not None:
            check_real(evaluation, value, f"evaluation.{field}={value}", f"evaluation.{field}=")
    sizes, k = evaluation.pr_sizes, evaluation.pr_k
    if "precision_recall" in measured(evaluation) and min(*sizes, evaluation.samples) <= k:
        raise UserError(
            f"evaluation.pr_k={k}, evaluation.pr_sizes=[{sizes[0]},{sizes[1]}] and "
            f"evaluation.samples={evaluation.samples}: each set needs more images than neighbours that are looked at; "
            "give evaluation.pr_k=3, or more images"
        )


def check_real(evaluation: EvaluationConfig, real: int, told: str, cure: str = "") -> None:
    """Returns when every metric of a protocol has real images enough, of which features are kept.

    Args:
        told: what says that there are so many, as it is typed.
        cure: the setting that gives more, up to its value; "" where the images themselves are too few.

    Raises:
        UserError: they are too few for one.
    """
    for name, field, least in (
        ("precision_recall", "pr_k", evaluation.pr_k + 1),
        ("density_coverage", "dc_k", evaluation.dc_k + 1),
        ("kid", "kid_size", evaluation.kid_size),
    ):
        if name in evaluation.metrics and real < least:
            given = f"evaluation.{field}={getattr(evaluation, field)}"
            lower = f"evaluation.{field}={real if field == 'kid_size' else real - 1}"
            more = f"{cure}{least} or more" if cure else "more of them"
            raise UserError(
                f"{told}: {real} real images are too few for {name} with {given}, which needs {least}; give {more}, "
                f"{lower} or less, or leave {name} out"
            )
