"""Scores of whole sets of images against other packages, on features that are taken by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_fid
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from selfguide.evaluation import job
from selfguide.evaluation.features.digitnet import embed, load_digitnet
from selfguide.evaluation.features.net import FeatureNet
from selfguide.evaluation.metrics.frechet import parted
from selfguide.evaluation.scores import fill, parts_in, read_reference, scores_of
from selfguide.spec.config import EvaluationConfig

pytestmark = pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")

REAL, MADE = 90, 70
WEIGHT = np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32)


class Channels(torch.nn.Module):
    """A net whose four features and two spatial ones tell red, green and blue apart, with three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        red, green, blue = x.unbind(1)
        features = [red.mean((1, 2)), green[:, 0, 0], blue[:, 1].mean(1), red[:, 3, 3]]
        return torch.stack(features, 1), red[:, :2, 5]

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight.T


def by_hand(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same features (N, 4) and (N, 2) of pictures (N, 8, 8, 3)."""
    red, green, blue = np.moveaxis((pictures.astype(np.float32) - 128) / 64, -1, 0)
    features = [red.mean((1, 2)), green[:, 0, 0], blue[:, 1].mean(1), red[:, 3, 3]]
    return np.stack(features, 1), red[:, :2, 5]


def gaussian(features: np.ndarray) -> dict[str, np.ndarray]:
    wide = features.astype(np.float64)
    return {"mu": wide.mean(0), "sigma": np.cov(wide, rowvar=False)}


def test_scores_of_adms_protocol_equal_torch_fidelitys_on_features_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # samples are paler than real images, so that they are precise and miss many of these
    real = rng.integers(0, 256, (REAL, 8, 8, 3)).astype(np.uint8)
    made = rng.integers(60, 200, (MADE, 8, 8, 3)).astype(np.uint8)
    net = FeatureNet(
        name="channels", sha256="", resize="TF1 bilinear", size=8, mean=(128.0,) * 3, std=(64.0,) * 3,
        width=4, spatial=2, net=Channels(),
    )  # fmt: skip
    of_real, of_made = by_hand(real), by_hand(made)
    (main, spatial), (own, own_spatial) = (
        (gaussian(x) for x in each) for each in (of_real, of_made)
    )
    # as ADM publishes them: statistics and images
    names = {"mu_s": spatial["mu"], "sigma_s": spatial["sigma"]}
    np.savez(tmp_path / "adm.npz", **main, **names, arr_0=real)
    parts = parts_in(tmp_path / "parts", MADE, 25)
    shown = torch.from_numpy(np.moveaxis(made, -1, 1).copy())
    fill(parts, lambda rows: net.rows(shown[torch.from_numpy(rows)]), doing="")
    evaluation = EvaluationConfig(protocol="fid_adm", metrics=("kid",), kid_subsets=5, kid_size=40)
    known = read_reference(str(tmp_path / "adm.npz"), net)
    found = scores_of("fid_adm", net, parts, known, full=True, evaluation=evaluation)

    first, second = (torch.from_numpy(each[0]).double() for each in (of_made, of_real))
    fid = fid_statistics_to_metric(own, main, False)["frechet_inception_distance"]
    sfid = fid_statistics_to_metric(own_spatial, spatial, False)["frechet_inception_distance"]
    of_logits = isc_features_to_metric(first.float() @ torch.from_numpy(WEIGHT).T, 10, True, 2020)
    both = prc_features_to_metric(first, second, prc_neighborhood=3, verbose=False)
    of_kernel = kid_features_to_metric(
        first, second, kid_subsets=5, kid_subset_size=40, verbose=False
    )
    assert both["precision"] - both["recall"] > 0.2
    assert {name: found[name] for name in parted(found)[0] if not name.startswith("fid_adm_")} == {
        "fid_adm": pytest.approx(fid, rel=1e-5),
        "sfid": pytest.approx(sfid, rel=1e-5),
        "inception_score": pytest.approx(of_logits["inception_score_mean"], rel=1e-5),
        "inception_score_of_splits_sd": pytest.approx(of_logits["inception_score_std"], rel=1e-4),
        "precision": pytest.approx(both["precision"], abs=1e-6),
        "recall": pytest.approx(both["recall"], abs=1e-6),
        "kid": pytest.approx(of_kernel["kernel_inception_distance_mean"], rel=1e-4),
        "kid_of_subsets_sd": pytest.approx(of_kernel["kernel_inception_distance_std"], rel=1e-4),
    }


def test_scores_of_digits_equal_clean_fids_on_the_same_features() -> None:
    net, _ = load_digitnet()
    rng = np.random.default_rng(0)
    real, made = (
        torch.from_numpy(rng.integers(low, 17, (count, 1, 8, 8)).astype(np.uint8))
        for low, count in ((0, 300), (4, 200))
    )
    found = job.score(net, real, made)
    rows, other = (embed(net, each)[0].double().numpy() for each in (real, made))

    def far(a: np.ndarray, b: np.ndarray) -> float:
        of_a, of_b = gaussian(a), gaussian(b)
        return clean_fid(of_a["mu"], of_a["sigma"], of_b["mu"], of_b["sigma"])

    assert found["fd_digits"] == pytest.approx(far(rows, other), rel=1e-6)
    assert found["floor"] == pytest.approx(far(rows[0::2], rows[1::2]), rel=1e-6)
    left = [far(rows, np.delete(other, part, 0)) for part in np.array_split(np.arange(200), 10)]
    assert found["fd_digits_se"] == pytest.approx(3 * np.std(left), rel=1e-4)
