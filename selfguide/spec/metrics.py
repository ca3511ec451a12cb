"""The one table of metrics: what each is called, which way it is better, how it is written, and its protocol's facts.

A new metric is a row here, a file in `selfguide/evaluation/metrics/` that computes it, and a `protocol` of
`evaluation=`; the board, the records and the protocols take the rest from the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfguide.spec.weight_files import DINOV2, EFFNET, INCEPTION, WeightFile

# of a protocol of images: two in each of the ten blocks that its standard error leaves out in turn
LEAST_SAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a score is shown."""

    # the heading of its column
    heading: str
    note: str
    higher_is_better: bool = False
    form: Literal["number", "percent", "count"] = "number"
    # whether seeds are shown as mean and standard deviation, or as the mean alone
    with_spread: bool = False
    # the score of the real data that stands beside it
    beside: str | None = None


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a protocol measures in: everything about it that a config does not choose."""

    # of the code; a new version scores every snapshot again
    version: int
    # of the feature net's weights
    sha256: str
    resize: str
    quantisation: str
    dtype: str = "fp32"
    # of protocols of images: how levels become what the net sees, and the file of its weights, None where the config
    # names one
    normalisation: str = ""
    weights: WeightFile | None = None
    # how many features it makes of an image; 0 where that is up to the net that the config names
    width: int = 0
    # names of the feature net: by them it is known where a model was made with another file of the same weights
    nets: tuple[str, ...] = ()
    of_images: bool = False
    # of 8 x 8 digits, in a net of our own that is committed
    of_digits: bool = False
    # of probes: what is measured in is the snapshot itself
    of_layers: bool = False
    # the score that it is named after, where that has another name than the protocol
    score: str = ""

    @property
    def on_gpus(self) -> bool:
        """Whether it takes a GPU a rank, where the cluster is asked for GPUs."""
        return self.of_images or self.of_layers


# in the order of the board's columns
METRICS: dict[str, Metric] = {
    "fd_digits": Metric(
        heading="fd_digits",
        note="Frechet distance to real digits in the features of a small digit net; lower is better",
        with_spread=True,
    ),
    "fd_digits_odd": Metric(
        heading="fd_digits (odd)",
        note="the same in the features of a digit net that was fitted on the other half of the scans; lower is better",
        with_spread=True,
    ),
    "fd_effnet": Metric(
        heading="fd_effnet",
        note="Frechet distance to real images in 112 features of EfficientNet-Lite0 at 96 px; lower is better",
        with_spread=True,
    ),
    "fid_adm": Metric(
        heading="FID (ADM)",
        note="Frechet inception distance as ADM's evaluator takes it: TF1 bilinear resize, its reference statistics",
        with_spread=True,
    ),
    "fid_clean": Metric(
        heading="FID (clean)",
        note="Frechet inception distance as clean-fid defines it: Pillow's bicubic resize, in float",
        with_spread=True,
    ),
    "fdd": Metric(
        heading="FDD",
        note="Frechet distance in the features of DINOv2 ViT-L/14 at 224 px; lower is better",
        with_spread=True,
    ),
    "fd_timm": Metric(
        heading="fd_timm",
        note="Frechet distance in the features of the net of timm that the protocol names; lower is better",
        with_spread=True,
    ),
    "sfid": Metric(
        heading="sFID",
        note="Frechet distance in ADM's 2,023 spatial features of Inception; lower is better",
    ),
    "inception_score": Metric(
        heading="IS",
        note="Inception Score, mean over 10 splits of the shuffled samples; higher is better",
        higher_is_better=True,
    ),
    "precision": Metric(
        heading="precision",
        note="share of samples that lie among 10,000 real images, by their 3rd neighbours",
        higher_is_better=True,
    ),
    "recall": Metric(
        heading="recall",
        note="share of 10,000 real images that lie among the samples, by their 3rd neighbours",
        higher_is_better=True,
    ),
    "floor": Metric(
        heading="floor",
        note="the same distance between the two halves of the real data: what a perfect model would reach",
    ),
    "floor_reconstruction": Metric(
        heading="floor of latents",
        note="the same distance of the data's latents, decoded: what a perfect model of them would reach",
    ),
    "copy_rate": Metric(
        heading="copies",
        note="share of samples nearer to a real image than 1 % of real images are; then that of real ones",
        form="percent",
        beside="copy_rate_real",
    ),
    "nmi": Metric(
        heading="NMI",
        note="normalised mutual information of the groups found with the true labels",
        higher_is_better=True,
        with_spread=True,
    ),
    "ari": Metric(
        heading="ARI",
        note="adjusted Rand index of the groups found with the true labels",
        higher_is_better=True,
        with_spread=True,
    ),
    "ami": Metric(
        heading="AMI",
        note="adjusted mutual information of the groups found with the true labels",
        higher_is_better=True,
        with_spread=True,
    ),
    "confident": Metric(
        heading="confident",
        note="share of samples with at least 0.9 on the digit net's top class",
        higher_is_better=True,
        form="percent",
    ),
    "classes": Metric(
        heading="classes",
        note="how many of the classes occur among the samples",
        higher_is_better=True,
        form="count",
    ),
    "kid": Metric(
        heading="KID",
        note="kernel distance to real images, unbiased, mean over 100 subsets of 1,000; lower is better",
    ),
    "density": Metric(
        heading="density",
        note="how many balls around real images, out to their 5th neighbours, hold a sample; 1 for equal sets",
        higher_is_better=True,
    ),
    "coverage": Metric(
        heading="coverage",
        note="share of real images with a sample nearer than their 5th neighbour",
        higher_is_better=True,
        form="percent",
    ),
    "cluster_fd": Metric(
        heading="FD per cluster",
        note="mean Frechet distance between the samples and the real images of each cluster; lower is better",
    ),
    "near_copies": Metric(
        heading="copies (features)",
        note="share of samples nearer to a training image, in features, than 1 % of these are; then that of real ones",
        form="percent",
        beside="near_copies_real",
    ),
    "ood_auroc": Metric(
        heading="OOD AUROC",
        note="how well the nearest cosine to training images tells samples from test images; 0.5: not at all",
    ),
    "fdr": Metric(
        heading="FDR",
        note="mean over feature nets of the distance over that of the validation set, which has 1; lower is better",
    ),
    "ufid": Metric(
        heading="uFID",
        note="Frechet distance to the samples of a named unconditional run instead of real images",
    ),
    "drift": Metric(
        heading="drift",
        note="how far the first samples move, before they are rounded, when they are drawn in blocks of other sizes",
    ),
    "drift_device": Metric(
        heading="drift (device)",
        note="how far the first samples are, before they are rounded, from those that a CPU draws",
    ),
    "linear_accuracy": Metric(
        heading="linear probe",
        note="share of test images whose label a linear map of the best layer tells; chosen on a validation part",
        higher_is_better=True,
        form="percent",
    ),
    "knn_accuracy": Metric(
        heading="k-NN probe",
        note="share of test images whose label 20 neighbours in the best layer tell; chosen on a validation part",
        higher_is_better=True,
        form="percent",
    ),
    "linear_accuracy_input": Metric(
        heading="linear, no net",
        note="the linear probe of the images or latents themselves: what features have to beat",
        higher_is_better=True,
        form="percent",
    ),
    "knn_accuracy_input": Metric(
        heading="k-NN, no net",
        note="the k-NN probe of the images or latents themselves: what features have to beat",
        higher_is_better=True,
        form="percent",
    ),
}  # fmt: skip

# protocol of `evaluation=` -> what it measures in; its score is the metric of the same name, unless it names another
FEATURES: dict[str, Features] = {
    "fd_digits": Features(
        version=1,
        sha256="9ccbd016db9dbec4006e3f967b9a8432966ae68b6c73415b55c6d0d9e6eb9285",
        resize="none",
        quantisation="round to 0..16",
        of_digits=True,
    ),
    # for what was chosen by the first: this net has seen none of the scans that fitted that one
    "fd_digits_odd": Features(
        version=1,
        sha256="40a9c791844d4e9e214218875642ef1d5cf29a8e738d35b56e6f9f292543fd01",
        resize="none",
        quantisation="round to 0..16",
        of_digits=True,
    ),
    "fd_effnet": Features(
        version=1,
        sha256=EFFNET.sha256,
        resize="bicubic, antialiased, float, to 96",
        quantisation="round to 0..255",
        normalisation="(x - 127.5) / 127.5",
        weights=EFFNET,
        width=112,
        nets=("efficientnet_lite0_stage5",),
        of_images=True,
    ),
    "fid_adm": Features(
        version=1,
        sha256=INCEPTION.sha256,
        resize="TF1 bilinear, to 299",
        quantisation="round to 0..255",
        normalisation="(x - 128) / 128",
        weights=INCEPTION,
        width=2048,
        nets=("inception_v3_2015",),
        of_images=True,
    ),
    "fid_clean": Features(
        version=1,
        sha256=INCEPTION.sha256,
        resize="bicubic, antialiased, float, to 299",
        quantisation="round to 0..255",
        normalisation="(x - 128) / 128",
        weights=INCEPTION,
        width=2048,
        nets=("inception_v3_2015",),
        of_images=True,
    ),
    "fdd": Features(
        version=1,
        sha256=DINOV2.sha256,
        resize="bicubic, antialiased, float, to 224",
        quantisation="round to 0..255",
        normalisation="ImageNet's mean and deviation",
        weights=DINOV2,
        width=1024,
        # timm's, without and with the name of the weights, and torch.hub's
        nets=("vit_large_patch14_dinov2", "vit_large_patch14_dinov2.lvd142m", "dinov2_vitl14"),
        of_images=True,
    ),
    # of a net that the config names, with its sha256
    "fd_timm": Features(
        version=1,
        sha256="",
        resize="bicubic, antialiased, float, to the net's size",
        quantisation="round to 0..255",
        normalisation="the net's own mean and deviation",
        of_images=True,
    ),
    "probe": Features(
        version=1,
        sha256="",
        resize="none",
        quantisation="none",
        of_layers=True,
        score="linear_accuracy",
    ),
}


def higher_is_better(name: str) -> bool:
    """Whether more of that score is better; of a score that the table does not know, less is."""
    return name in METRICS and METRICS[name].higher_is_better
