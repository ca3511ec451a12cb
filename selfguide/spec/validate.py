"""Everything a user can type, checked before a job is queued. Pure: reads nothing but the config.

`selfguide.spec.config.build` has checked names and types. Here every field is held to the laws beside its type, each
group to its own laws, and what stands below are the laws between groups.
"""

from __future__ import annotations

import re

from selfguide.spec.accumulation import cut_batch, node_counts
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, OnlineGuidance, SamplerConfig
from selfguide.spec.config.cluster import check_cluster
from selfguide.spec.config.data import check_data
from selfguide.spec.config.laws import as_typed, check, check_read, image_counts
from selfguide.spec.config.path import check_on_path, check_path
from selfguide.spec.config.sampler import check_sampler
from selfguide.spec.config.train import check_train
from selfguide.spec.extras import check_extras
from selfguide.spec.initial_weights import validate_init
from selfguide.spec.metrics import FEATURES, LEAST_SAMPLES, METRICS
from selfguide.spec.records import layer_name
from selfguide.spec.sizes import architecture
from selfguide.spec.suggest import check_known
from selfguide.spec.timm_nets import check_net
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.weak import WeakModel, check_snapshots, weak_models
from shards import storage
from shards.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# what the feature net of fd_digits reads
_DIGITS = (1, 8, 8)
# micro-batches of a step whose gradients are added up in bf16
_MOST_IN_BF16 = 256
# samples of fd_digits: one in each of the ten blocks that its standard error leaves out in turn
_LEAST_DIGITS = 10
_GROUPS = (
    "cluster",
    "train",
    "engine",
    "data",
    "model",
    "path",
    "guidance",
    "evaluation",
    "init",
    "augment",
    "auxiliary",
    "align",
    "contrastive",
)


def validate(config: Config) -> None:
    """Returns when the run can be trained as asked.

    Raises:
        UserError: the first law that does not hold; names the field, its value and the cure.
    """
    check(config, "")
    for name in _GROUPS:
        check(getattr(config, name), name)
    for each in config.more_evaluations:
        check(each, "evaluation")
        check_read(each, "evaluation")
    check_cluster(config.cluster, config.nodes)
    _check_names(config)
    _check_batch(config)
    _check_min_nodes(config)
    _check_clock(config)
    _check_engine(config)
    check_train(config.train, averaged=config.guidance.average is not None)
    check_data(config.data)
    check_path(config.path, config.data.shape[0])
    check_sampler(config.sampler, config.path)
    for name in _GROUPS:
        check_read(getattr(config, name), name)
    config.guidance.check(config)
    _check_network(config)
    _check_scored(config)


def validate_scoring(config: Config) -> None:
    """Returns when a run that was trained under this config can be sampled and scored as it says.

    Laws of training are left out: a snapshot that is there may be older than one of them.

    Raises:
        UserError: as `validate`.
    """
    for each in (config.evaluation, *config.more_evaluations):
        check(each, "evaluation")
        check_read(each, "evaluation")
    check_sampler(config.sampler, config.path)
    _check_scored(config)


def _check_scored(config: Config) -> None:
    _check_sampling(config)
    for by in config.scored_by or (config,):
        _check_evaluation(by)
        _check_mixture(by)


def _check_names(config: Config) -> None:
    for field, value in (("name", config.name), ("experiment", config.experiment)):
        if value is not None and not _NAME.fullmatch(value):
            raise UserError(
                f"{field}={value!r} names a folder: use letters, digits, '.', '_' and '-', beginning with "
                "a letter or digit, at most 100 characters"
            )
    if not config.runs.strip():
        raise UserError("runs is empty: give runs=FOLDER")
    if storage.is_remote(config.runs):
        raise UserError(
            f"runs={config.runs!r}: the run folder lives on a file system all nodes share, not on S3"
        )


def _check_batch(config: Config) -> None:
    """The global batch is ranks x micro batch x a whole number of accumulations."""
    train, ranks = config.train, config.ranks
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


def _check_min_nodes(config: Config) -> None:
    """Fewer nodes than asked for train the same run: the batch divides, and nothing depends on the number of ranks."""
    least, most, train = config.min_nodes, config.nodes, config.train
    if least is not None and least > most:
        raise UserError(f"min_nodes={least} is more than nodes={most}; take {most} or less")
    if not config.elastic:
        return
    works = node_counts(config, least=1)
    if least not in works:
        raise UserError(
            f"min_nodes={least}: train.batch={train.batch} does not divide by {least} nodes x "
            f"{config.cluster.gpus_per_node} in micro-batches of {config.micro_batch} or a little less; take "
            f"min_nodes={' or '.join(map(str, works))} with nodes={most}"
        )
    if config.cluster.nodelist:
        raise UserError(
            f"min_nodes={least} with cluster.nodelist={config.cluster.nodelist}: a job on fewer nodes cannot have all "
            f"that are listed; take cluster.nodelist=null, or min_nodes={most}"
        )
    if config.cluster.restart != "successor":
        raise UserError(
            f"min_nodes={least} with cluster.restart={config.cluster.restart}: it is the run's next job that asks for "
            f"fewer nodes; take cluster.restart=successor, or min_nodes={most}"
        )
    if isinstance(config.guidance, OnlineGuidance) and config.guidance.queue:
        raise UserError(
            f"min_nodes={least} with guidance.queue={config.guidance.queue}: each rank has a queue of its own, so "
            f"Sinkhorn would see other images on fewer nodes; take guidance.queue=0, or min_nodes={most}"
        )


def _check_clock(config: Config) -> None:
    """Images seen advance by whole batches, so whatever happens at an image count happens at a multiple of them."""
    batch = config.train.batch
    counts = [*image_counts(config.train, "train"), *image_counts(config.guidance, "guidance")]
    for field, images in counts:
        if images % batch:
            above = -(-images // batch) * batch
            near = f"{above - batch} or {above}" if above > batch else str(above)
            raise UserError(
                f"{field}={images} counts images and must be a multiple of train.batch={batch}; "
                f"take {field}={near}"
            )


def _check_engine(config: Config) -> None:
    """Combinations of engine, stage, precision and optimiser that would train wrongly, or not at all."""
    _check_sums(config)
    engine, stage = config.engine, f"engine.zero_stage={config.engine.zero_stage}"
    if engine.backend == "torch":
        # 1 is the default, which nobody need have asked for
        if engine.zero_stage != 1:
            raise UserError(
                f"{stage} is DeepSpeed's, and engine.backend=torch holds everything on every rank; drop it, or take "
                "engine.backend=deepspeed"
            )
        return
    if engine.zero_stage == 0 and engine.dtype == "bf16":
        raise UserError(
            f"{stage} with engine.dtype=bf16: there DeepSpeed takes a step with gradients of zero when it starts, so "
            "every later one has the wrong bias correction; take engine.zero_stage=1, or engine.backend=torch"
        )
    if engine.zero_stage == 3 and engine.compile:
        raise UserError(
            f"{stage} with engine.compile=true: DeepSpeed fetches weights inside of each block, which breaks its graph "
            "and makes it slower; set engine.compile=false, or take engine.zero_stage=2"
        )
    if config.train.optimiser == "muon":
        raise UserError(
            "train.optimiser=muon needs whole matrices, and engine.backend=deepspeed steps slices of them, unless by a "
            "Muon of its own, which is another one and compiles its kernels in the first step; take "
            "engine.backend=torch, or train.optimiser=adamw"
        )


def _check_sums(config: Config) -> None:
    """Both backends add micro-batches' gradients up in the dtype of the weights.

    In bf16 a term below a 256th of the sum is rounded away: with 64 micro-batches a sum of normal numbers is wrong by
    0.8 to 0.9 %, with 256 by 2 %, with 1,024 by up to a third.
    """
    images = config.train.batch // config.ranks
    count = cut_batch(config, config.ranks).accumulation
    if config.engine.dtype != "bf16" or count <= _MOST_IN_BF16:
        return
    larger = next(m for m in range(-(-images // _MOST_IN_BF16), images + 1) if images % m == 0)
    raise UserError(
        f"train.micro_batch={config.micro_batch} makes {count} micro-batches a step, and in engine.dtype=bf16 the "
        f"sum of more than {_MOST_IN_BF16} loses gradients that are small beside it; take train.micro_batch={larger}, "
        "more ranks, or engine.dtype=fp32"
    )


def _check_network(config: Config) -> None:
    channels, size, _ = config.data.shape
    net = architecture(config)
    for field, value, shape in (("size", net.size, size), ("channels", net.channels, channels)):
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
    config.guidance.head(net)  # reads a layer that the network has
    for settings in config.components.values():
        settings.check(config, net)
    validate_init(config, net)


def _check_sampling(config: Config) -> None:
    if config.sampler.name == "dopri5" and config.sampler.steps != SamplerConfig.steps:
        raise UserError(
            f"sampler.steps={config.sampler.steps} is a number that dopri5 chooses itself, by sampler.rtol and "
            "sampler.atol; drop it or change the sampler"
        )
    _check_weak(config)
    guided, channels = config.sampler.guided_channels, config.data.shape[0]
    if guided is not None and guided > channels:
        raise UserError(
            f"sampler.guided_channels={guided} and data.shape={list(config.data.shape)} has {channels} channels; "
            f"take {channels} or fewer, or null to guide all"
        )


def _check_weak(config: Config) -> None:
    """What guidance leads away from is there, as far as the config says what a snapshot has."""
    if config.sampler.g == 1:
        return
    for weak in weak_models(config.sampler.weak):
        _check_weak_model(config, weak)
        if config.train.preview and weak.kind in ("average", "snapshot"):
            raise UserError(
                f"train.preview={config.train.preview} draws samples in training, and sampler.weak={weak.word} is read "
                "from what is published; take train.preview=0, or another weak model"
            )


def _check_weak_model(config: Config, weak: WeakModel) -> None:
    if weak.kind == "condition" and config.guidance.source == "none":
        raise UserError(
            f"sampler.g={config.sampler.g} guides towards a condition, and with guidance.source=none there is none; "
            "take sampler.g=1, or guidance=online, labels or sidecar"
        )
    if weak.kind == "condition" and not config.trains_null:
        raise UserError(
            f"sampler.g={config.sampler.g} leads away from the network without its condition, and with guidance.drop=0 "
            "it is never trained without; take sampler.g=1, another sampler.weak, or guidance.drop=0.1"
        )
    if weak.average is not None and weak.average not in (kept := averages_of(config)):
        guided = config.evaluation.average
        others = [f"sampler.weak=average-{each.key}" for n, each in enumerate(kept) if n != guided]
        others = others or ["sampler.g=1", "another weak model"]
        raise UserError(
            f"sampler.weak={weak.word} is no average that the run keeps; take {' or '.join(others)}, or a new run with "
            "train.ema_halflife or train.ema_width of several values"
        )
    last, every = config.train.images, config.train.snapshot_every
    # a run that went on under other settings has snapshots at other images
    if weak.images is not None and weak.images >= last:
        check_snapshots(config.sampler.weak, last, planned=range(every, last, every))
    if weak.kind == "head" and not config.auxiliary.on:
        raise UserError(
            "sampler.weak=head is an auxiliary head that is trained beside the network, and this one has none; take "
            "another weak model, or a new run with auxiliary.weight=0.5"
        )
    if weak.kind == "routed" and not getattr(architecture(config), "route", 0.0):
        raise UserError(
            "sampler.weak=routed is the way that a network trains on with model.route, and this one has none; take "
            "another weak model, or a new run with model.route=0.5"
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for number, each in enumerate(evaluation.expected):
        at = f"evaluation.expected[{number}]"
        check_known(f"{at}.metric", each.metric, METRICS)
        if not each.source.strip():
            raise UserError(
                f"{at}.source={each.source!r} of {each.metric}={each.value:g}: give source=NAME, the paper or page "
                "that published it"
            )
    if evaluation.prior != "empirical" and not config.guidance.one_group:
        raise UserError(
            f"evaluation.prior={evaluation.prior} draws groups, and with these settings of "
            f"guidance.source={config.guidance.source} an image is not conditioned on one group alone; take "
            "evaluation.prior=empirical"
        )
    if evaluation.average >= len(averages := averages_of(config)):
        kept = ", ".join(f"{number}: {each}" for number, each in enumerate(averages))
        raise UserError(
            f"evaluation.average={evaluation.average} is not one of the run's averages ({kept})"
        )
    features = FEATURES.get(evaluation.protocol)
    guided = averages[evaluation.average]
    samples = config.sampler.g != 1 and features is not None and not features.of_layers
    if samples and any(each.average == guided for each in weak_models(config.sampler.weak)):
        others = [f"sampler.weak=average-{each.key}" for each in averages if each != guided]
        raise UserError(
            f"sampler.weak={config.sampler.weak} leads evaluation.average={evaluation.average} away from itself; take "
            f"{' or '.join(others) or 'another weak model'}"
        )
    of_digits = features is not None and features.of_digits
    if of_digits and config.data.shape != _DIGITS:
        raise UserError(
            f"evaluation.protocol={evaluation.protocol} scores {list(_DIGITS)} digits, and data.shape is "
            f"{list(config.data.shape)}; set evaluation=none"
        )
    if of_digits and evaluation.reference:
        raise UserError(
            f"evaluation.reference={evaluation.reference} is read with protocols of images, and evaluation.protocol="
            f"{evaluation.protocol} compares with all scans; take evaluation.reference=null"
        )
    if of_digits and evaluation.samples < _LEAST_DIGITS:
        raise UserError(
            f"evaluation.samples={evaluation.samples}: the standard error leaves out a tenth of the samples at a time; "
            f"take {_LEAST_DIGITS} or more"
        )
    if evaluation.protocol in FEATURES and FEATURES[evaluation.protocol].of_images:
        _check_images(config)
    if evaluation.protocol == "probe":
        check_probe(config)
    if of_digits and config.data.crop:
        raise UserError(
            f"data.crop=true makes a model of windows, and evaluation.protocol={evaluation.protocol} compares with "
            "whole images; set data.crop=false or evaluation=none"
        )


def _check_images(config: Config) -> None:
    """A protocol of images: enough of them for an error bar, one thing to compare with, and a net that is named."""
    evaluation = config.evaluation
    if evaluation.samples < LEAST_SAMPLES:
        raise UserError(
            f"evaluation.samples={evaluation.samples}: the standard error leaves out a tenth of the samples at a time; "
            f"take {LEAST_SAMPLES} or more"
        )
    cluster = config.cluster
    if evaluation.ranks > cluster.gpus_per_node and cluster.promises_gpus:
        raise UserError(
            f"evaluation.ranks={evaluation.ranks}: the ranks of an evaluation are on one node, which has "
            f"cluster.gpus_per_node={cluster.gpus_per_node}; take that many or fewer"
        )
    if evaluation.reference and evaluation.shards:
        raise UserError(
            f"evaluation.reference={evaluation.reference} and evaluation.shards={evaluation.shards}: samples are "
            "compared with one of them; leave the other out"
        )
    if evaluation.reference and "://" in evaluation.reference:
        raise UserError(
            f"evaluation.reference={evaluation.reference} must be a file on a file system that all nodes share"
        )
    if evaluation.protocol == "fd_timm":
        if not evaluation.net:
            raise UserError(
                "evaluation.protocol=fd_timm measures in the net of timm that you name; give "
                "evaluation.net=resnet50.a1_in1k or another"
            )
        check_net(evaluation.net, evaluation.weights)
    whole = evaluation.crop is None
    if config.data.crop and whole and not (evaluation.reference or evaluation.shards):
        edge = config.data.shape[-1]
        raise UserError(
            "data.crop=true makes a model of windows, and its score would compare them with whole images; give "
            f"evaluation.crop={edge}, evaluation.shards=ROOT of images in the model's size, or evaluation=none"
        )
    check_extras(config)


def check_probe(config: Config) -> None:
    """Returns when a probe's layers, noise-times and vector are there, and its parts are of one data set.

    Raises:
        UserError: one that is not, with its cure.
    """
    evaluation = config.evaluation
    names = [layer_name(config, layer) for layer in evaluation.layers]
    for field, given, all_of in (
        ("layers", evaluation.layers, names),
        ("noise_times", evaluation.noise_times, [*evaluation.noise_times]),
    ):
        if len({*all_of}) < len(all_of):
            raise UserError(
                f"evaluation.{field}={as_typed(given)} names one of them twice; name each once"
            )
    if not evaluation.noise_times:
        raise UserError(
            "evaluation.noise_times=[]: a probe reads features at one or more; give some, such as [0.2]"
        )
    for time in evaluation.noise_times:
        check_on_path(config.path, "evaluation.noise_times=[{}]", time)
    if evaluation.pooling == "cls" and not getattr(architecture(config), "cls_token", False):
        raise UserError(
            "evaluation.pooling=cls: this network has no [CLS] (model.cls_token=false); take evaluation.pooling=mean"
        )
    if config.data.mix:
        raise UserError(
            f"data.mix={list(config.data.mix)} with evaluation.protocol=probe: a probe splits one data set; set "
            "evaluation=none"
        )


def _check_mixture(config: Config) -> None:
    """Rows of a sidecar, and a score's reference, are of one data set."""
    data = config.data
    if not data.mix:
        return
    if config.guidance.source == "sidecar":
        raise UserError(
            f"data.mix={list(data.mix)} with guidance.source=sidecar: the rows of a sidecar are one data set's; leave "
            "data.mix out, or take guidance=online"
        )
    evaluation = config.evaluation
    if evaluation.protocol != "none" and not (evaluation.reference or evaluation.shards):
        raise UserError(
            f"data.mix={list(data.mix)} with evaluation.protocol={config.evaluation.protocol}: a score compares with "
            "one data set; set evaluation=none"
        )
