"""`evaluation=`: which protocol scores the snapshots, against what, and how many jobs may do so at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from selfguide.spec.config.laws import AtLeast, Positive, ReadWith, Seed, Share, Within

_IMAGES = (
    "protocol=fd_effnet", "protocol=fid_adm", "protocol=fid_clean", "protocol=fdd", "protocol=fd_timm"
)  # fmt: skip
# what is measured beside a protocol's own score; `selfguide.spec.extras` has the settings of each
Extra = Literal[
    "inception_score", "precision_recall", "kid", "density_coverage", "near_copies", "ood_auroc", "fdr", "ufid",
    "cluster_fd", "agreement", "drift",
]  # fmt: skip
_PROBE = "protocol=probe"
# what NumPy's former generator takes, whose shuffles others draw
_NUMPY_SEED = Within(0, 2**32 - 1)
# fields that name shards, and those with the hash of these shards' manifest
MANIFESTS = {"shards": "manifest", "test": "test_manifest"}
# fields that name files of statistics, and those with the sha256 of these files
FILES = {"reference": "reference_sha256", "unconditional": "unconditional_sha256"}
# what a submission fills in: which content a path had
PINS = MANIFESTS | FILES
# of real images: their two halves need as many as a score with an error does (`selfguide.spec.metrics.LEAST_SAMPLES`)
LEAST_REAL = 40


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A number that somebody published for what this run does; the board shows it beside ours."""

    # a score's name, such as fid_adm or inception_score
    metric: str
    value: float
    # the paper or page, and its row
    source: str


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """No part of it is identity: scores are records beside the run."""

    protocol: Literal[
        "none",
        "fd_digits",
        "fd_digits_odd",
        "fd_effnet",
        "fid_adm",
        "fid_clean",
        "fdd",
        "fd_timm",
        "probe",
    ] = "none"
    # of a probe the most images that a layer is chosen on, and the most that it is tested on
    samples: Annotated[int, AtLeast(1)] = 5000
    # images that are drawn, and embedded, together; protocols of images pad the last block to it. Of a probe, images of
    # one step of its training
    batch: Annotated[int, AtLeast(1)] = 500
    seed: Annotated[int, Seed(2**62)] = 0
    # which of the averages that the run keeps, the first being the main one
    average: Annotated[int, AtLeast(0)] = 0
    # how often groups are drawn: as in training, or evenly, C-EDM's control
    # or exactly equally often (quota)
    prior: Literal["empirical", "uniform", "quota"] = "empirical"
    in_flight: Annotated[int, AtLeast(1)] = 1
    # newest: a snapshot whose evaluation has not begun when the next one is published is skipped, but for the run's
    # last one and the first after each `milestone_images`
    snapshots: Literal["all", "newest"] = "all"
    milestone_images: Annotated[int | None, AtLeast(1), ReadWith("snapshots=newest")] = None
    attempts: Annotated[int, AtLeast(1)] = 3
    # what samples are compared with, in place of the run's own images: a .npz of mean and covariance, or shards of
    # images, such as a held-out part. An experiment may name the file, so that evaluation=none leaves it unread. A
    # probe is tested on labelled shards, made as the run's own, or on a fifth of these
    reference: str | None = None
    # of the file, which the submission fills in where it is there
    reference_sha256: Annotated[str | None, ReadWith("reference=FILE")] = None
    shards: Annotated[str | None, ReadWith(*_IMAGES, _PROBE)] = None
    # hash of these shards' manifest, which the submission fills in
    manifest: Annotated[str | None, ReadWith("shards=ROOT")] = None
    # the file of the feature net's weights, where it does not lie in one of the usual places
    weights: Annotated[str | None, ReadWith(*_IMAGES)] = None
    # published weights of timm, such as resnet50.a1_in1k, or a model whose file is given; and what sha256 the file has,
    # which the submission fills in
    net: Annotated[str | None, ReadWith("protocol=fd_timm")] = None
    sha256: Annotated[str | None, ReadWith("protocol=fd_timm")] = None
    # weights of the autoencoder whose latents the data are, where it is not to be looked for
    decoder: Annotated[str | None, ReadWith(*_IMAGES)] = None
    # refuses a submission whose evaluations would have to wait for a file
    require: Annotated[bool, ReadWith(*_IMAGES)] = False
    # of a job, each on a GPU where the cluster is asked for GPUs
    ranks: Annotated[int, AtLeast(1), ReadWith(*_IMAGES, _PROBE)] = 1
    # sets of so many samples, each of seeds of its own; scores are their mean, beside the standard deviation
    sets: Annotated[int, AtLeast(1), ReadWith(*_IMAGES)] = 1
    # so many images alone of the shards that samples are compared with
    reference_count: Annotated[int | None, AtLeast(LEAST_REAL), ReadWith(*_IMAGES)] = None
    # draws these, each at most once; null takes the first ones. Shards that we wrote are shuffled by a seed in their
    # manifest, so that their first images are a random sample. Those of indexed tars may be of a few classes alone: a
    # submission fills in 0 there
    reference_seed: Annotated[int | None, Seed(2**62), ReadWith("reference_count=N")] = None
    # edge of the window that is cut out of each of these, in the middle or by a seed
    crop: Annotated[int | None, AtLeast(1), ReadWith(*_IMAGES)] = None
    crop_rule: Annotated[Literal["centre", "random"], ReadWith("crop=EDGE")] = "centre"
    crop_seed: Annotated[int, AtLeast(0), ReadWith("crop_rule=random")] = 0
    metrics: Annotated[tuple[Extra, ...], ReadWith(*_IMAGES)] = ()
    # of real images, whose features are kept for metrics that need more than their mean and covariance: as many as
    # ADM's references hold (Dhariwal and Nichol 2021)
    kept: Annotated[int, AtLeast(2), ReadWith(*_IMAGES)] = 10_000
    # 10 splits of the images, shuffled by torch-fidelity's seed; null keeps their order, as ADM's evaluator does
    is_splits: Annotated[
        int, AtLeast(1), ReadWith("metrics=inception_score", "protocol=fid_adm")
    ] = 10
    is_seed: Annotated[
        int | None, _NUMPY_SEED, ReadWith("metrics=inception_score", "protocol=fid_adm")
    ] = 2020
    # ADM's: 3rd neighbours, of 10,000 real and 50,000 made images at most, and a ball holds its surface
    pr_k: Annotated[int, AtLeast(1), ReadWith("metrics=precision_recall", "protocol=fid_adm")] = 3
    pr_sizes: Annotated[
        tuple[int, int], AtLeast(2), ReadWith("metrics=precision_recall", "protocol=fid_adm")
    ] = (10_000, 50_000)
    pr_strict: Annotated[bool, ReadWith("metrics=precision_recall", "protocol=fid_adm")] = False
    # as torch-fidelity draws them
    kid_subsets: Annotated[int, AtLeast(1), ReadWith("metrics=kid")] = 100
    kid_size: Annotated[int, AtLeast(2), ReadWith("metrics=kid")] = 1000
    kid_seed: Annotated[int, _NUMPY_SEED, ReadWith("metrics=kid")] = 2020
    # Naeem et al. 2020
    dc_k: Annotated[int, AtLeast(1), ReadWith("metrics=density_coverage")] = 5
    # of real images, which are as near to another one as what counts as a copy
    copies_quantile: Annotated[float, Share(), ReadWith("metrics=near_copies")] = 0.01
    # images that a cluster needs in both sets to count
    cluster_least: Annotated[int, AtLeast(2), ReadWith("metrics=cluster_fd")] = 2
    # of models conditioned on rows of training images: k-means clusters of these rows; null is each row's own group
    cluster_count: Annotated[int | None, AtLeast(2), ReadWith("metrics=cluster_fd")] = None
    # protocols in whose nets the ratio is taken, beside this one's own
    fdr_protocols: Annotated[tuple[str, ...], ReadWith("metrics=fdr")] = ()
    # images that nobody trained on, as shards, and the hash of their manifest, which the submission fills in
    test: Annotated[str | None, ReadWith("metrics=ood_auroc", "metrics=fdr")] = None
    test_manifest: Annotated[str | None, ReadWith("test=ROOT")] = None
    # statistics of an unconditional run's samples, which `tools.reference samples` makes
    unconditional: Annotated[str | None, ReadWith("metrics=ufid")] = None
    unconditional_sha256: Annotated[str | None, ReadWith("unconditional=FILE")] = None
    # sizes of blocks in which the first samples are drawn again
    drift_blocks: Annotated[tuple[int, ...], AtLeast(1), ReadWith("metrics=drift")] = (1, 7)
    # of a probe: layers by number from 1 or by name, () for all of them, and the noise-times it reads each at
    layers: Annotated[tuple[str, ...], ReadWith(_PROBE)] = ()
    noise_times: Annotated[tuple[float, ...], Within(0.0, 1.0), ReadWith(_PROBE)] = ()
    # how a layer's tokens become one vector: their mean, [CLS], or one patch of each image, drawn anew at each pass
    pooling: Annotated[Literal["mean", "cls", "token"], ReadWith(_PROBE)] = "mean"
    # over the training part, and Adam's first learning rate, which falls to 0 by a cosine
    passes: Annotated[int, AtLeast(1), ReadWith(_PROBE)] = 15
    learning_rate: Annotated[float, Positive(), ReadWith(_PROBE)] = 4e-3
    # what is to be reached; changes nothing of a score
    expected: tuple[Expected, ...] = ()

    @property
    def next_seed(self) -> int:
        """The first from which no sample of this protocol is drawn: image i of set k has the seed + k N + i."""
        return self.seed + self.sets * self.samples
