"""The scores of `python -m tools.score`, once its command line is read."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from selfguide.discovery.resumable import Rows
from selfguide.evaluation.beside import Beside, check_features
from selfguide.evaluation.features.net import FeatureNet, load_feature_net
from selfguide.evaluation.metrics.frechet import parted
from selfguide.evaluation.scores import (
    NEIGHBOURS,
    Crop,
    Known,
    fill,
    make_reference,
    moments_of,
    parts_in,
    read_reference,
    read_unconditional,
    scores_of,
)
from selfguide.spec.config import EvaluationConfig, build
from selfguide.spec.config.laws import check, check_read
from selfguide.spec.data_fit import check_part, part_seed
from selfguide.spec.extras import OF_TEST, OF_TRAINING, SETTINGS, check_sets, extras
from selfguide.spec.identity import digest
from selfguide.spec.records import crop_rule
from selfguide.spec.suggest import nearest
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.lock import lock
from tools import score_others
from tools.reference.make import net_of
from tools.sample_files import open_images
from tools.sample_set import CHOSEN, NPZ
from tools.score import METRICS

# the settings of `evaluation=` that further metrics read here
SETTABLE = {
    *(field for name in METRICS for field in SETTINGS[name].values()),
    *(
        "test",
        "unconditional",
        "fdr_protocols",
        "reference_count",
        "reference_seed",
        "crop",
        "crop_rule",
        "crop_seed",
    ),
}
REFERENCES = Path(".references")
# features of samples whose score is not taken yet
PARTS = Path(".scores")


def run(options: argparse.Namespace) -> int:
    """Prints the scores."""
    images = open_images(Path(options.samples))
    evaluation = evaluation_of(options, len(images))
    net = net_of(options)
    others = {
        name: load_feature_net(name).to(net.device) for name in sorted(evaluation.fdr_protocols)
    }
    try:
        known, unconditional = _known(net, evaluation), _unconditional(net, evaluation)
        beside = _beside(net, evaluation, unconditional)
        # before images are read
        check_features(evaluation, known.features, OF_TRAINING)
        submitted = score_others.as_submitted(
            evaluation,
            reference_sha256=known.sha256,
            unconditional_sha256=unconditional.sha256 if unconditional else None,
            net_sha256=net.sha256,
        )
    except UserError as error:
        raise _as_typed(error) from error
    nets = [net, *others.values()]
    decided: dict[str, Any] = {**net.about, "batch": options.batch, "files": images.stamp}
    if others:
        decided["nets"] = [each.about for each in others.values()]
    work = PARTS / digest(decided)
    work.mkdir(parents=True, exist_ok=True)
    # the same command may be running
    with lock(work, create=False, required=False):
        parts = parts_in(work, len(images), options.batch)
        try:
            fill(
                parts,
                lambda rows: torch.cat([each.rows(images.at(rows)) for each in nets], 1),
                doing=f"scoring {len(images):,} images",
            )
        except UserError as error:
            # of files that nobody scores as they are
            shutil.rmtree(work, ignore_errors=True)
            raise _as_typed(error) from error
        try:
            scores, left_out = _scores(parts, nets, known, beside, evaluation)
        except UserError as error:
            # by other settings the same parts have a score
            raise _as_typed(error) from error
        shutil.rmtree(work, ignore_errors=True)
    found = {
        "samples": options.samples,
        "count": len(images),
        "protocol": options.protocol,
        "scores": scores,
        "features": net.about,
        "reference": options.reference or options.shards,
        "reference_sha256": known.sha256,
    }
    if chosen := chosen_by(Path(options.samples)):
        found["chosen"] = chosen
    if beside_settings := extras(evaluation):
        found["metrics"] = beside_settings
    try:
        if score_others.name_of(options) is not None:
            kept = score_others.keep(
                options,
                submitted,
                scores=scores,
                left_out=left_out,
                stamp=images.stamp,
                chosen=chosen,
            )
            found["kept"] = str(kept)
    finally:
        # what took long is said also where it cannot be kept
        _print(found, options.json)
    return 0


def _print(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print("\n".join(f"{name:<24}{value:.5g}" for name, value in found["scores"].items()))
    if "chosen" in found:
        print(score_others.chosen_words(found["chosen"]))
    if "kept" in found:
        print(f"kept in {found['kept']}")


def _scores(
    parts: Rows,
    nets: Sequence[FeatureNet],
    known: Known,
    beside: Beside,
    evaluation: EvaluationConfig,
) -> tuple[dict[str, float], tuple[float, ...]]:
    """The scores of images whose features in all nets, the protocol's first, are in `parts`, and those of a jackknife.

    The latter are the protocol's own score without each block of images in turn.
    """
    if "fdr" in evaluation.metrics:
        beside = _with_ratios(beside, parts, nets, evaluation, known)
    protocol = evaluation.protocol
    return parted(
        scores_of(
            protocol,
            nets[0],
            parts,
            known,
            full=protocol == "fid_adm",
            evaluation=evaluation,
            beside=beside,
        )
    )


def chosen_by(samples: Path) -> dict[str, Any] | None:
    """What `tools.confidence` chose these samples by, where it made them: such a score is no model's own."""
    said = samples.with_name(CHOSEN)
    if samples.name != NPZ or not said.is_file():
        return None
    return dict(json.loads(said.read_text()).get("chosen", {})) or None


def evaluation_of(options: argparse.Namespace, count: int) -> EvaluationConfig:
    """What is measured of so many samples, as `evaluation=` of a run has it.

    Raises:
        UserError: an unknown metric or setting, or one that does not hold or is not read.
    """
    values: dict[str, Any] = {
        "protocol": options.protocol,
        "samples": count,
        "batch": options.batch,
        "metrics": list(options.metrics),
        "net": options.net,
        "sha256": options.sha256,
        "shards": options.shards,
        "reference": options.reference,
    }
    for text in options.setting:
        name, equals, value = text.partition("=")
        if name not in SETTABLE:
            raise UserError(
                f"--setting {text}: there is no {name!r}{nearest(name, SETTABLE)}; known: {', '.join(sorted(SETTABLE))}"
            )
        if not equals:
            raise UserError(f"--setting {text} has no value: give --setting {name}=VALUE")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--setting {text} cannot be read: give a number, text, or a list as {name}=[A,B]"
            ) from error
    try:
        evaluation = build(EvaluationConfig, values, "evaluation")
        check(evaluation, "evaluation")
        check_read(evaluation, "evaluation")
        check_sets(evaluation)
    except UserError as error:
        raise _as_typed(error) from error
    if evaluation.test is None:
        return evaluation
    return replace(evaluation, test_manifest=manifests.load(evaluation.test).hash)


def _as_typed(error: UserError) -> UserError:
    """The same in the words of this command."""
    text = re.sub(
        r"evaluation\.metrics=\[(.*?)\]",
        lambda found: "--metrics " + re.sub(r"[',]", "", found[1]),
        str(error),
    )
    text = re.sub(r"evaluation\.metrics\b", "--metrics", text)
    text = re.sub(r"evaluation\.(shards|reference)=", r"--\1 ", text)
    text = re.sub(r"evaluation\.(\w+)", r"--setting \1", text)
    return UserError(re.sub(r"evaluation=(\w+)", r"--protocol \1", text))


def _known(net: FeatureNet, evaluation: EvaluationConfig) -> Known:
    if evaluation.reference:
        return read_reference(_here(evaluation.reference), net)
    return _made(str(evaluation.shards), net, evaluation)


def _here(given: str) -> str:
    """A file here, before one that lies where weights are."""
    here = Path(given).expanduser()
    return str(here.absolute()) if here.is_file() else given


def _made(root: str, net: FeatureNet, evaluation: EvaluationConfig) -> Known:
    count, crop = evaluation.reference_count, Crop.of_evaluation(evaluation)
    manifest = manifests.load(root)
    seed = evaluation.reference_seed
    if count is not None and seed is None:
        seed = part_seed(manifest)
    decided: dict[str, Any] = {**net.about, "batch": evaluation.batch, "count": count}
    # not named where it is as it always was
    if evaluation.kept != NEIGHBOURS:
        decided["kept"] = evaluation.kept
    if seed is not None:
        decided["seed"] = seed
    if crop is not None:
        decided["crop"] = crop_rule(evaluation)
    check_part(evaluation, manifest.count, f"{root} holds {manifest.count} images")
    folder = REFERENCES / f"{manifest.hash[:12]}-{digest(decided)}"
    known = make_reference(
        root,
        net,
        folder,
        part=evaluation.batch,
        count=count,
        seed=seed,
        kept=evaluation.kept,
        crop=crop,
    )
    assert known is not None  # this is the only rank
    return known


def _test(net: FeatureNet, evaluation: EvaluationConfig) -> Known:
    whole = replace(evaluation, reference_count=None, reference_seed=None)
    return _made(str(evaluation.test), net, whole)


def _unconditional(net: FeatureNet, evaluation: EvaluationConfig) -> Known | None:
    if not evaluation.unconditional:
        return None
    return read_unconditional(_here(evaluation.unconditional), net)


def _beside(net: FeatureNet, evaluation: EvaluationConfig, unconditional: Known | None) -> Beside:
    test = _test(net, evaluation).features if {*OF_TEST} & {*evaluation.metrics} else None
    return Beside(test=test, unconditional=unconditional.main if unconditional else None)


def _with_ratios(
    beside: Beside,
    parts: Rows,
    nets: Sequence[FeatureNet],
    evaluation: EvaluationConfig,
    known: Known,
) -> Beside:
    """The same with the distances of samples and of the test images in each net."""
    distances, validation, first = {}, {}, 0
    for name, net in zip(
        (evaluation.protocol, *sorted(evaluation.fdr_protocols)), nets, strict=True
    ):
        main = (known if not first else _made(str(evaluation.shards), net, evaluation)).main
        columns = slice(first, first + net.width)
        distances[name] = main.distance(*moments_of(parts, columns, main.mean).gaussian())
        test = _test(net, evaluation).main
        validation[name] = main.distance(test.mean, test.covariance)
        first += net.width + net.spatial
    return replace(beside, distances=distances, validation=validation)
