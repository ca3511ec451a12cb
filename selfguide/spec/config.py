"""What a user may set: frozen dataclasses, and the one function that builds them from a composed mapping.

Hydra composes YAML into a mapping; `build` turns it into these classes and refuses what they do not know, with
the nearest name. Counts of images are the clock: every cadence, schedule and horizon is in images seen.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from selfguide.spec.architecture import TimeInput
from selfguide.spec.words import nearest
from shards.errors import UserError

T = TypeVar("T")


Prediction = Literal["v", "eps", "x0", "edm"]
Pooling = Literal["cls", "mean", "flat", "attention"]  # see `selfguide.models.backbone.pool`
POOLINGS = typing.get_args(Pooling)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A row of `selfguide.spec.sizes` and what this experiment changes of it (None keeps the row's value).

    Which of the fields a model has depends on its family; one that it does not have is an error.
    """

    name: str
    size: int | None = None  # edge of the square input, in latent pixels
    channels: int | None = None
    learn_sigma: bool | None = None
    time: TimeInput | None = None
    cls_token: bool | None = None  # a learned token that collects what the online guidance reads
    # transformers
    patch: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    norm: Literal["layer", "rms"] | None = None
    mlp: Literal["gelu", "swiglu"] | None = None
    rope: bool | None = None
    qk_norm: bool | None = None
    conv: bool | None = None  # U-ViT's 3x3 convolution over the output
    # UNets
    base: int | None = None
    mult: tuple[int, ...] | None = None  # width of each grid over `base`
    blocks: int | None = None  # for each grid
    attention: tuple[int, ...] | None = None  # downsamplings at which blocks attend
    groups: int | None = None  # of every group norm
    dropout: float | None = None


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """The road from data (noise-time 0) to noise (1), what is predicted there, and where on it training looks."""

    name: Literal["rectified_flow", "ddpm", "vp", "ve", "edm"] = "rectified_flow"
    sigma_min: float = 0.0  # rectified_flow only; 1e-4 is SGFM's form
    betas: Literal["linear", "scaled_linear"] = "linear"  # ddpm only
    prediction: Prediction = "v"
    sigma_data: float = 0.5  # of the data as the model sees it; prediction=edm and weighting=edm
    weighting: Literal["plain", "edm", "uncertainty"] = "plain"
    cosine: float = 0.0  # weight of 1 - cos(v_hat, v); 1 in LightningDiT
    time_density: Literal["uniform", "logit_normal", "log_normal", "log_uniform"] = (
        "uniform"  # SiT; logit-normal is LightningDiT's, log-normal EDM's, log-uniform VE's (of sigma)
    )
    time_mean: float = 0.0  # of the logit of tau, or of ln sigma (EDM: -1.2)
    time_std: float = 1.0  # (EDM: 1.2)
    uniform_after: float | None = None  # share of training after which times are drawn uniformly


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How samples are drawn. `g` is the total guidance weight: 1 is none, 0 is unconditional."""

    name: Literal["euler", "heun", "ddim", "dpm1", "dpm2", "dpmpp", "euler_maruyama", "dopri5"] = (
        "euler"
    )
    steps: int = 50
    g: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)  # noise-times in which `g` applies
    guided_channels: int | None = (
        None  # only the first so many; 3 is DiT's, SiT's and LightningDiT's
    )
    shift: float = (
        1.0  # above 1 spends more steps at high noise; LightningDiT's 0.3 is 1 / 0.3 here
    )
    rtol: float = 1e-5  # dopri5 only; SGFM's setting
    atol: float = 1e-5
    eta: float = 0.0  # ddim: 0 deterministic, 1 ancestral
    clip: float | None = None  # ddim: data stays within +-clip; 1 for pixels, never for latents
    churn: float = 0.0  # heun: EDM's S_churn, with its span of sigmas and its noise scale
    churn_sigma: tuple[float, float] = (0.0, 1e9)
    churn_noise: float = 1.0
    diffusion: Literal["sit", "repa", "sbdm"] = "sit"  # euler_maruyama: its diffusion coefficient


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the weights begin."""

    source: Literal["scratch", "snapshot", "official"] = "scratch"
    path: str | None = None  # of a published snapshot's folder, or of a checkpoint's file
    form: Literal["dit", "sit", "uvit"] | None = None  # official only: whose names the file has
    labels: Literal["drop", "keep"] = "drop"  # the label table, less its null row
    # whether time, path and prediction must be those of the weights; SGFM gives U-ViT others and lets it learn anew
    time: Literal["as_trained", "relearn"] = "as_trained"


@dataclass(frozen=True, kw_only=True)
class NoGuidance:
    """Unconditional training."""

    source: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class LabelGuidance:
    """Human labels from the shards: the upper reference, never label-free."""

    source: Literal["labels"] = "labels"
    drop: float = 0.1  # DiT, SiT


@dataclass(frozen=True, kw_only=True)
class OnlineGuidance:
    """Prototypes found while training by a Sinkhorn over all ranks (Hu et al. 2023, arXiv 2312.08825)."""

    source: Literal["online"] = "online"
    groups: int = 300  # K
    level: Literal["image", "patch"] = (
        "image"  # what is told its prototype: an image, or each patch
    )
    prototype_width: int | None = None  # P; None is the model's width, as in the paper
    head_width: int | None = None  # None is half the feature's width, as in the paper
    layer: int | None = None  # block whose output is read, counted from 1; None is the middle
    pooling: Pooling = "cls"  # of the tokens there; level "patch" reads each patch's
    noise_time: float = 0.2  # at which ids are extracted
    view: Literal["extraction", "training"] = (
        "extraction"  # what the head learns from; "training" is the paper's
    )
    mask: tuple[float, float] = (0.15, 0.25)  # noise-times whose L_SK counts, view "training" only
    # where the published method can be read otherwise; configs/guidance/sgfm_paper and sgfm_code choose, and the
    # defaults are the corrected forms. The first three are read with view "training" only.
    view_told: Literal["nothing", "as_trained"] = (
        "nothing"  # what the head's view is told: as at extraction, or what the step trains with (the code)
    )
    codes_over: Literal["counted", "all"] = (
        "counted"  # the samples Sinkhorn shares out: those whose L_SK counts, or all (the code)
    )
    mean_over: Literal["counted", "all"] = (
        "counted"  # what L_SK is a mean over; "all" (the code) weighs it by the mask's share
    )
    extraction_noise: Literal["own", "training"] = (
        "own"  # in which ids are extracted; "training" is the step's (the code)
    )
    teacher_buffers: Literal["student", "frozen"] = (
        "student"  # whose BatchNorm statistics name ids; "frozen" are those at the switch (the code)
    )
    told_rows: Literal["unit", "averaged"] = (
        "unit"  # "averaged": the average of unit rows as it is, a little shorter than 1 (the code)
    )
    untold: Literal["embedding", "zero"] = (
        "embedding"  # what stands for nothing: a learned row, as in the code, or zeros, as in the paper
    )
    switch: float = 0.5  # share of training after which the model is told its prototypes
    epsilon: float = 0.05
    iterations: int = 3
    queue: int = 0  # recent features of each rank that join Sinkhorn (SwAV); SGFM found that they give nothing
    temperature: float = 0.1
    weight: float = 1.0  # lambda, reached linearly at the switch
    drop: float = 0.1
    window: int = 65_536  # images over which p(k) is counted, one to two of them
    revive: float = (
        0.0  # prototypes below this part of an even share of a window begin anew; 0 never
    )
    teacher_refresh: int = 1024  # images between refreshes of the teacher from the EMA masters


@dataclass(frozen=True, kw_only=True)
class SidecarGuidance:
    """What was found of each image beforehand, read from annotation sidecars; see `shards.sidecar`.

    Any of them, together: SGDM (Hu et al. 2023, arXiv 2210.06462) tells a group and a box or mask.
    """

    source: Literal["sidecar"] = "sidecar"
    ids: str | None = None  # folder of a sidecar of kind id or multi_hot
    groups: int = 0  # K of `ids`; without them, of a mask, whose groups are told as a multi-hot too
    layout: str | None = None  # of kind box or mask
    channels: int = 0  # of `layout`: 1 for boxes, the groups of a mask
    dense: str | None = None  # of kind dense
    width: int = 0  # P of `dense`
    drop: float = 0.1  # one mask for all of them (SGDM)
    shuffle: float = 0.0  # share of images told another image's row: a control


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder or s3:// prefix of shards, and what the experiment expects to find there."""

    root: str
    shape: tuple[int, int, int]  # (C, H, W)
    # further roots that are mixed with `root`, and weights of it and of each of them
    mix: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    classes: int = 0
    mode: Literal["window", "global"] = "window"
    # of images; a latent cannot be mirrored or cut, but shards may hold it with its mirror image's
    flip: bool = False  # each visit shows the image or its mirror image
    crop: bool = (
        False  # each visit shows another window of `shape`, of stored images that are larger
    )
    # at a block that is damaged: reading ends, or samples of a sound one stand in, up to a share of all samples
    on_damage: Literal["fail", "substitute"] = "fail"
    damaged: float = 0.01
    # no part of what a run is: who reads, and where a node keeps blocks of remote shards, up to how many bytes
    threads: int = 4  # of each rank
    decoders: int = 0  # processes of each rank that decode pictures; 0 decodes in its thread
    cache: str | None = None
    cache_bytes: int = 64 << 30

    @property
    def roots(self) -> str | tuple[str, ...]:
        """As `shards.open` takes it, beside `shares`."""
        return (self.root, *self.mix) if self.mix else self.root

    @property
    def shares(self) -> tuple[float, ...] | None:
        return self.weights if self.mix else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation, in images seen."""

    images: int
    batch: int  # global
    micro_batch: int | None = None  # per rank and forward; None takes batch / ranks
    learning_rate: float = 1e-4
    warmup_images: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_halflife: tuple[int, ...] = (7_100_000,)  # images; 0.9999 a step at batch 1024
    ema_ramp: float = 0.05  # horizon never longer than this share of the images seen (EDM)
    log_every: int = 10_000
    snapshot_every: int = 1_000_000
    checkpoint_every: int = 1_000_000
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who takes the optimiser step: DeepSpeed ZeRO, or bare/DDP torch as its reference."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: Literal[1, 2] = 1
    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False  # torch.compile, block by block
    recompute: bool = False  # activations inside blocks are computed again in backward: less memory, a third more work
    channels_last: bool = False  # UNets on GPUs
    timeout_s: int = 600  # of one collective


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Which protocol scores the snapshots, and how many jobs may do so at once."""

    protocol: Literal["none", "fd_digits"] = "none"
    samples: int = 5000
    batch: int = 500
    seed: int = 0
    prior: Literal["empirical", "uniform"] = (
        "empirical"  # how often groups are drawn: as in training, or evenly, C-EDM's control
    )
    in_flight: int = 1
    attempts: int = 3


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where jobs run. Experiments never name a partition: this profile does."""

    kind: Literal["auto", "local", "slurm", "devcluster"]
    gpus_per_node: int = 8  # also the ranks per node; processes where there are no GPUs
    request_gpus: bool = True
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_min: int = 24 * 60
    evaluation_timeout_min: int = 120
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything one submission resolves to."""

    experiment: str
    model: ModelConfig
    path: PathConfig
    sampler: SamplerConfig
    guidance: NoGuidance | LabelGuidance | OnlineGuidance | SidecarGuidance
    data: DataConfig
    train: TrainConfig
    engine: EngineConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig
    init: InitConfig = InitConfig()
    nodes: int = 1
    seed: int = 0
    name: str | None = None
    runs: str = "runs"
    follow: bool = False
    dry_run: bool = False

    @property
    def ranks(self) -> int:
        return self.nodes * self.cluster.gpus_per_node

    @property
    def micro_batch(self) -> int:
        """Images per rank and forward."""
        return self.train.micro_batch or self.train.batch // self.ranks


def build(cls: type[T], values: Any, where: str = "") -> T:
    """`cls` from a plain mapping, types checked.

    Raises:
        UserError: an unknown or missing key, or a value of the wrong type; names the field, the value, the cure.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the config'} must be a mapping, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            dotted = f"{where}.{key}" if where else key
            raise UserError(f"unknown key '{dotted}'{nearest(str(key), fields)}")
    made = {}
    for name, spec in fields.items():
        dotted = f"{where}.{name}" if where else name
        if name in values and values[name] != "???":
            made[name] = _convert(hints[name], values[name], dotted)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"'{dotted}' has no value: give {dotted}=...")
    return cls(**made)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, or a UserError that names `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            known = ", ".join(str(a) for a in args)
            raise UserError(
                f"{where}={value!r} is not one of: {known}{nearest(str(value), map(str, args))}"
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) > 1:  # a union of configs is told apart by its `source`
            return build(_by_source(options, value, where), value, where)
        return _convert(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}={value!r} must be a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise UserError(f"{where}={list(value)!r} must have {len(args)} values")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _convert(h, v, f"{where}[{i}]")
            for i, (h, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}={value!r} must be a mapping")
        return {str(k): str(v) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _by_source(options: list[Any], value: Any, where: str) -> Any:
    sources = {typing.get_args(typing.get_type_hints(o)["source"])[0]: o for o in options}
    source = value.get("source") if isinstance(value, dict) else None
    if source not in sources:
        raise UserError(f"{where}.source={source!r} is not one of: {', '.join(sources)}")
    return sources[source]


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 2e6 is how people write two million
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}={value!r} must be {hint.__name__}, not {type(value).__name__}")
