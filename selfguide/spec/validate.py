"""Everything a user can type, checked before a job is queued: what a value means for the others.

`selfguide.spec.config.build` has already checked names and types; here stand the laws between fields. Each broken
one names the field, its value and the cure. Pure: reads nothing but the config.
"""

from __future__ import annotations

import math
import re

from selfguide.spec.annotations import validate_annotations
from selfguide.spec.architecture import Architecture
from selfguide.spec.config import (
    Config,
    LabelGuidance,
    OnlineGuidance,
    PathConfig,
    SamplerConfig,
    SidecarGuidance,
    TrainConfig,
)
from selfguide.spec.online import validate_online
from selfguide.spec.origin import validate_init
from selfguide.spec.reading import validate_reading
from selfguide.spec.sampling import refuse_unread, validate_sampler
from selfguide.spec.sizes import architecture
from selfguide.spec.unet import UNetArchitecture
from shards.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGITS = (1, 8, 8)  # what fd_digits' feature net reads
_BY_NOISE_TIME, _BY_SIGMA = ("uniform", "logit_normal"), ("log_normal", "log_uniform")
# path -> predictions and time densities. What is not here has no sane size there: v is (1 + sigma)^2 eps on ve and edm,
# sigma of uniform noise-times has no mean, EDM's mixture needs a = 1. A log-normal sigma is a logit-normal noise-time.
_ON_PATH: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rectified_flow": (("v", "eps", "x0"), _BY_NOISE_TIME),
    "ddpm": (("eps", "x0", "v"), _BY_NOISE_TIME),
    "vp": (("eps", "x0", "v"), _BY_NOISE_TIME),
    "ve": (("eps", "x0", "edm"), _BY_SIGMA),
    "edm": (("edm", "x0", "eps"), _BY_SIGMA),
}


def validate(config: Config) -> None:
    """Returns when the run can be trained as asked.

    Raises:
        UserError: the first law that does not hold, with its cure.
    """
    if config.cluster.kind == "auto":
        raise UserError(
            "cluster=auto must be resolved first; choose cluster=local or cluster=slurm"
        )
    _names(config)
    _ranks(config)
    _clock(config)
    _optimiser(config)
    validate_reading(config)
    _model(config)
    _path(config)
    _sampling(config)
    _evaluation(config)


def _names(config: Config) -> None:
    for field, value in (("name", config.name), ("experiment", config.experiment)):
        if value is not None and not _NAME.fullmatch(value):
            raise UserError(
                f"{field}={value!r} names a folder: use letters, digits, '.', '_' and '-', beginning with "
                "a letter or digit, at most 100 characters"
            )
    for field, value in (("runs", config.runs), ("data.root", config.data.root)):
        if not value.strip():
            raise UserError(f"{field} is empty: give {field}=FOLDER")
    if config.runs.startswith("s3://"):
        raise UserError(
            f"runs={config.runs!r}: the run folder lives on a file system all nodes share, not on S3"
        )


def _ranks(config: Config) -> None:
    cluster = config.cluster
    _at_least("nodes", config.nodes, 1)
    _at_least("cluster.gpus_per_node", cluster.gpus_per_node, 1)
    if cluster.kind == "local" and config.nodes > 1:
        raise UserError(
            f"nodes={config.nodes} with cluster=local: this is one machine; take cluster=slurm, or nodes=1"
        )
    _at_least("cluster.timeout_min", cluster.timeout_min, 1)
    _at_least("cluster.evaluation_timeout_min", cluster.evaluation_timeout_min, 1)
    if cluster.cpus_per_task is not None:
        _at_least("cluster.cpus_per_task", cluster.cpus_per_task, 1)
    if cluster.mem_gb is not None:
        _positive("cluster.mem_gb", cluster.mem_gb)
    _at_least("train.batch", config.train.batch, 1)
    _divides(config)


def _divides(config: Config) -> None:
    """The global batch is ranks x micro batch x a whole number of accumulations."""
    train, ranks = config.train, config.ranks
    if train.micro_batch is not None:
        _at_least("train.micro_batch", train.micro_batch, 1)
    unit = ranks * (train.micro_batch or 1)
    if train.batch % unit:
        below, above = train.batch // unit * unit, -(-train.batch // unit) * unit
        near = f"{below} or {above}" if below else str(above)
        what = f"{ranks} ranks ({config.nodes} nodes x {config.cluster.gpus_per_node})"
        if train.micro_batch:
            what += f" x train.micro_batch={train.micro_batch} = {unit}"
        raise UserError(
            f"train.batch={train.batch} does not divide by {what}; take train.batch={near}"
        )


def _clock(config: Config) -> None:
    train = config.train
    counts = {
        "train.images": train.images,
        "train.log_every": train.log_every,
        "train.snapshot_every": train.snapshot_every,
        "train.checkpoint_every": train.checkpoint_every,
    }
    if isinstance(config.guidance, OnlineGuidance):
        counts["guidance.teacher_refresh"] = config.guidance.teacher_refresh
        counts["guidance.window"] = config.guidance.window
    for field, images in counts.items():
        _at_least(field, images, 1)
        if images % train.batch:
            above = -(-images // train.batch) * train.batch
            near = f"{above - train.batch} or {above}" if above > train.batch else str(above)
            raise UserError(
                f"{field}={images} counts images and must be a multiple of train.batch={train.batch}; "
                f"take {field}={near}"
            )
    _at_least("train.warmup_images", train.warmup_images, 0)
    if train.warmup_images > train.images:
        raise UserError(
            f"train.warmup_images={train.warmup_images} is longer than train.images={train.images}; shorten it"
        )
    _at_least("train.keep_checkpoints", train.keep_checkpoints, 1)


def _optimiser(config: Config) -> None:
    train = config.train
    _positive("train.learning_rate", train.learning_rate)
    _positive("train.clip", train.clip)
    _positive("train.ema_ramp", train.ema_ramp)
    _within("train.weight_decay", train.weight_decay, 0.0, math.inf)
    for i, beta in enumerate(train.betas):
        _within(f"train.betas[{i}]", beta, 0.0, 1.0, below_high=True)
    if not train.ema_halflife:
        raise UserError(
            "train.ema_halflife=[] is empty: snapshots are EMA weights, give at least one half-life"
        )
    for i, images in enumerate(train.ema_halflife):
        _at_least(f"train.ema_halflife[{i}]", images, 1)
    if len(set(train.ema_halflife)) != len(train.ema_halflife):
        raise UserError(
            f"train.ema_halflife={list(train.ema_halflife)} names one half-life twice; drop one"
        )
    _at_least("engine.timeout_s", config.engine.timeout_s, 1)
    _at_least("seed", config.seed, 0)


def _model(config: Config) -> None:
    channels, height, width = config.data.shape
    if height != width or min(channels, height) < 1:
        raise UserError(
            f"data.shape={list(config.data.shape)} must be (C, H, W), positive, with H = W"
        )
    _at_least("data.classes", config.data.classes, 0)
    if isinstance(config.guidance, OnlineGuidance) and config.guidance.prototype_width is not None:
        _at_least("guidance.prototype_width", config.guidance.prototype_width, 1)
    if isinstance(config.guidance, SidecarGuidance):
        validate_annotations(config, config.guidance)
    if isinstance(config.guidance, OnlineGuidance):
        validate_online(config.guidance, config.model.name)
    net = architecture(config)
    for field, value, shape in (("size", net.size, height), ("channels", net.channels, channels)):
        if value != shape:
            raise UserError(
                f"model.{field}={value} disagrees with data.shape={list(config.data.shape)}; "
                f"drop model.{field} or set it to {shape}"
            )
    if config.engine.channels_last and not isinstance(net, UNetArchitecture):
        raise UserError(
            f"engine.channels_last=true is a layout for convolutions and model.name={config.model.name!r} is a "
            "transformer: set engine.channels_last=false, or take a UNet"
        )
    _guidance(config, net)
    validate_init(config, net)


def _guidance(config: Config, net: Architecture) -> None:
    guidance = config.guidance
    if isinstance(guidance, LabelGuidance):
        _within("guidance.drop", guidance.drop, 0.0, 1.0, below_high=True)
        if config.data.classes < 1:
            raise UserError(
                f"guidance.source=labels needs data.classes > 0, not {config.data.classes}; give data.classes=... "
                "if the shards have labels, else guidance=online"
            )
    if not isinstance(guidance, OnlineGuidance):
        return
    if guidance.level == "image" and guidance.pooling == "cls" and not config.model.cls_token:
        raise UserError(
            "guidance.pooling=cls reads a learned [CLS] token and model.cls_token is false; set "
            "model.cls_token=true, or guidance.pooling=flat (small nets) or mean"
        )
    if guidance.layer is not None and not 1 <= guidance.layer <= len(net.layers):
        raise UserError(
            f"guidance.layer={guidance.layer} is not a block of this model; take 1 to {len(net.layers)}"
        )
    _at_least("guidance.groups", guidance.groups, 2)
    _at_least("guidance.iterations", guidance.iterations, 1)
    if guidance.head_width is not None:
        _at_least("guidance.head_width", guidance.head_width, 1)
    _within("guidance.noise_time", guidance.noise_time, 0.0, 1.0)
    if guidance.noise_time == 1:
        raise UserError(
            f"guidance.noise_time={guidance.noise_time} is pure noise, of which no groups can be made; "
            "take a value below 1"
        )
    _interval("guidance.mask", guidance.mask)
    _switch(guidance.switch, config.train)
    _positive("guidance.epsilon", guidance.epsilon)
    _positive("guidance.temperature", guidance.temperature)
    _within("guidance.weight", guidance.weight, 0.0, math.inf)
    _within("guidance.drop", guidance.drop, 0.0, 1.0, below_high=True)


def _switch(switch: float, train: TrainConfig) -> None:
    """Both stages have a step at least."""
    if not 0 < switch < 1:
        raise UserError(
            f"guidance.switch={switch} is a share of training: take a value between 0 and 1, both excluded"
        )
    steps = train.images // train.batch
    if steps == 1:
        raise UserError(
            f"train.images={train.images} is one step of train.batch={train.batch}, and guidance=online has two "
            "stages; train for two batches or more"
        )
    if round(switch * steps) == steps:
        latest = math.floor((1 - 1 / steps) * 1000) / 1000
        raise UserError(
            f"guidance.switch={switch} is the end of {steps} steps: the model would never be told its prototypes; "
            f"take guidance.switch={latest:g} or less"
        )


def _path(config: Config) -> None:
    path = config.path
    predictions, densities = _ON_PATH[path.name]
    for field, known in (("prediction", predictions), ("time_density", densities)):
        value = getattr(path, field)
        if value not in known:
            raise UserError(
                f"path.{field}={value} does not go with path.name={path.name}; take path.{field}={' or '.join(known)}"
            )
    _within("path.sigma_min", path.sigma_min, 0.0, 1.0, below_high=True)
    _positive("path.sigma_data", path.sigma_data)
    _within("path.time_mean", path.time_mean, -math.inf, math.inf)
    _positive("path.time_std", path.time_std)
    _unread(path)
    _weighting(path)
    _cosine(path, config.data.shape[0])


def _unread(path: PathConfig) -> None:
    """A setting that nothing reads would still make another run of the same training."""
    normal = path.time_density in ("logit_normal", "log_normal")
    readers = {
        "sigma_min": (path.name == "rectified_flow", "path.name=rectified_flow"),
        "betas": (path.name == "ddpm", "path.name=ddpm"),
        "sigma_data": (
            path.prediction == "edm" or path.weighting != "plain",
            "path.prediction=edm, path.weighting=edm or uncertainty",
        ),
        "time_mean": (normal, "path.time_density=logit_normal or log_normal"),
        "time_std": (normal, "path.time_density=logit_normal or log_normal"),
        "uniform_after": (path.time_density == "logit_normal", "path.time_density=logit_normal"),
    }
    for field, (read, reader) in readers.items():
        value = getattr(path, field)
        if not read and value != getattr(PathConfig(), field):
            raise UserError(
                f"path.{field}={value} is read with {reader} only; drop it or take that"
            )


def _weighting(path: PathConfig) -> None:
    """EDM's weight goes with edm, where it is 1, and with v: from 0.8 to 4 on rectified flow at sigma_data = 0.5.

    On VP and DDPM our v is dx/dtau, not Salimans & Ho's a eps - b x0, and the weight follows beta: near 2 for most
    noise-times, above 900 in pure noise. On a raw x0 it grows as 1 / sigma^2 and on a raw eps as sigma^2, ten
    thousandfold and more: a few images would make the whole loss.
    """
    share = path.uniform_after
    if share is not None and not 0 < share < 1:
        raise UserError(
            f"path.uniform_after={share} is a share of training: take a value between 0 and 1, both excluded"
        )
    if path.weighting != "plain" and path.prediction in ("x0", "eps"):
        bounded = "edm" if path.name in ("ve", "edm") else "v"
        raise UserError(
            f"path.weighting={path.weighting} has no bound with path.prediction={path.prediction}; take "
            f"path.prediction={bounded}, or path.weighting=plain"
        )


def _cosine(path: PathConfig, channels: int) -> None:
    _within("path.cosine", path.cosine, 0.0, math.inf)
    if path.cosine and path.prediction != "v":
        raise UserError(
            f"path.cosine={path.cosine} compares velocities, and path.prediction={path.prediction}; take "
            "path.prediction=v or path.cosine=0"
        )
    if path.cosine and channels == 1:
        raise UserError(
            f"path.cosine={path.cosine} compares directions over channels, and the data has one; take path.cosine=0"
        )


def _sampling(config: Config) -> None:
    refuse_unread(config.sampler)
    if config.sampler.name == "dopri5" and config.sampler.steps != SamplerConfig.steps:
        raise UserError(
            f"sampler.steps={config.sampler.steps} is a number that dopri5 chooses itself, by sampler.rtol and "
            "sampler.atol; drop it or change the sampler"
        )
    validate_sampler(config.sampler, config.path)
    if config.guidance.source == "none" and config.sampler.g != 1:
        raise UserError(
            f"sampler.g={config.sampler.g} guides towards what the model is told, and with guidance.source=none it is "
            "told nothing; take sampler.g=1, or guidance=online, labels or sidecar"
        )
    guided, channels = config.sampler.guided_channels, config.data.shape[0]
    if guided is not None and guided > channels:
        raise UserError(
            f"sampler.guided_channels={guided} and data.shape={list(config.data.shape)} has {channels} channels; "
            f"take {channels} or fewer, or null to guide all"
        )


def _evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for field in ("samples", "batch", "in_flight", "attempts"):
        _at_least(f"evaluation.{field}", getattr(evaluation, field), 1)
    _at_least("evaluation.seed", evaluation.seed, 0)
    _prior(config)
    if evaluation.protocol == "fd_digits" and config.data.shape != _DIGITS:
        raise UserError(
            f"evaluation.protocol=fd_digits scores {list(_DIGITS)} digits, and data.shape is "
            f"{list(config.data.shape)}; set evaluation=none"
        )
    if evaluation.protocol == "fd_digits" and config.data.crop:
        raise UserError(
            "data.crop=true makes a model of windows, and evaluation.protocol=fd_digits compares with whole images; "
            "set data.crop=false or evaluation=none"
        )


def _prior(config: Config) -> None:
    """Evenly drawn are groups only: not layouts or features, of which there are as many as images."""
    if config.evaluation.prior == "empirical":
        return
    guidance = config.guidance
    rows = isinstance(guidance, SidecarGuidance) and (
        guidance.ids is None or guidance.layout is not None or guidance.dense is not None
    )
    patches = isinstance(guidance, OnlineGuidance) and guidance.level == "patch"
    if guidance.source == "none" or rows or patches:
        raise UserError(
            f"evaluation.prior={config.evaluation.prior} draws groups, and with these settings of "
            f"guidance.source={guidance.source} an image is not told one group alone; take evaluation.prior=empirical"
        )


def _at_least(field: str, value: int, low: int) -> None:
    if value < low:
        raise UserError(f"{field}={value} is too small; take {low} or more")


def _positive(field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{field}={value} must be a positive number")


def _within(field: str, value: float, low: float, high: float, *, below_high: bool = False) -> None:
    """`value` in [low, high], or [low, high) with `below_high`; never infinite or NaN."""
    if not math.isfinite(value) or not low <= value <= high or (below_high and value == high):
        top = f"{high})" if below_high or math.isinf(high) else f"{high}]"
        raise UserError(f"{field}={value} must be a number in [{low}, {top}")


def _interval(field: str, value: tuple[float, float]) -> None:
    low, high = value
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"{field}={list(value)} is a span of noise-times: take two numbers with 0 <= low <= high <= 1"
        )
