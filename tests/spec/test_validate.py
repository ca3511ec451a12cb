"""What a user can type wrongly: one message that names the field, its value and the cure."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.choices import experiments, options
from launcher.compose import compose
from selfguide.spec.validate import validate
from shards.errors import UserError

SLURM = compose(["experiment=digits_uncond", "cluster=slurm"])
DIGITS = ["experiment=digits_dit", "cluster=local"]
ONLINE = compose(DIGITS)

BAD = [
    # settings, field and value, a word of the cure
    ("nodes=0", "nodes=0", "1 or more"),
    ("nodes=-3", "nodes=-3", "1 or more"),
    ("nodes=2", "nodes=2", "nodes=1"),
    ("cluster.gpus_per_node=0", "cluster.gpus_per_node=0", "1 or more"),
    ("cluster.gpus_per_node=3", "train.batch=128", "train.batch=126 or 129"),
    ("train.micro_batch=48", "train.batch=128", "train.batch=96 or 192"),
    ("train.micro_batch=0", "train.micro_batch=0", "1 or more"),
    ("train.batch=127", "train.batch=127", "126 or 128"),
    ("train.batch=1", "train.batch=1", "train.batch=2"),
    ("train.batch=0", "train.batch=0", "1 or more"),
    ("train.images=1000", "train.images=1000", "896 or 1024"),
    ("train.images=0", "train.images=0", "1 or more"),
    ("train.log_every=100", "train.log_every=100", "128"),
    ("train.snapshot_every=1", "train.snapshot_every=1", "128"),
    ("train.checkpoint_every=-128", "train.checkpoint_every=-128", "1 or more"),
    (
        "train.warmup_images=300_000",
        "train.warmup_images=300000",
        "train.warmup_images=256000 or less",
    ),
    ("train.keep_checkpoints=0", "train.keep_checkpoints=0", "1 or more"),
    ("train.keep_snapshots=0", "train.keep_snapshots=0", "1 or more"),
    (
        "train.keep_snapshots_every=1280",
        "train.keep_snapshots_every=1280",
        "train.keep_snapshots=NUMBER",
    ),
    ("train.learning_rate=0", "train.learning_rate=0.0", "positive"),
    ("train.learning_rate=nan", "train.learning_rate=nan", "positive"),
    ("train.learning_rate=inf", "train.learning_rate=inf", "positive"),
    ("train.clip=-1", "train.clip=-1.0", "null for none"),
    ("train.clip=0", "train.clip=0.0", "null for none"),
    ("train.ema_ramp=-1", "train.ema_ramp=-1.0", "[0.0"),
    ("train.ema_ramp=0.1 train.ema_rise=steps", "train.ema_ramp=0.1", "train.ema_rise=share"),
    ("train.decay_images=0", "train.decay_images=0", "1 or more"),
    ("train.ramps_count=never", "train.ramps_count='never'", "after, before"),
    ("train.decayed=biases", "train.decayed='biases'", "all, weights, matrices"),
    ("train.rate_decay=linear", "train.rate_decay='linear'", "inverse_sqrt, cosine"),
    ("train.final_rate=0.1", "train.final_rate=0.1", "train.rate_decay=cosine"),
    ("train.rate_decay=cosine train.final_rate=2", "train.final_rate=2.0", "[0.0, 1.0]"),
    (
        "train.rate_decay=cosine train.decay_images=256_000",
        "train.decay_images=256000",
        "take train.decay_images=128000",
    ),
    ("train.loss_spike=1", "train.loss_spike=1.0", "(1.0, inf)"),
    ("train.loss_spike=-3", "train.loss_spike=-3.0", "(1.0, inf)"),
    ("train.optimiser=lion", "train.optimiser='lion'", "adamw, adam, muon"),
    ("train.optimiser=muon", "compiles its kernels", "engine.backend=torch"),
    ("train.checkpoint_store=checkpoints", "train.checkpoint_store='checkpoints'", "s3://BUCKET"),
    ("engine.zero_stage=4", "engine.zero_stage=4", "0, 1, 2, 3"),
    ("engine.zero_stage=0 engine.dtype=bf16", "engine.zero_stage=0", "engine.zero_stage=1"),
    ("engine.zero_stage=3 engine.compile=true", "engine.zero_stage=3", "engine.compile=false"),
    (
        "guidance=none engine.dtype=bf16 train.batch=1280 train.micro_batch=2",
        "train.micro_batch=2",
        "train.micro_batch=4",
    ),
    (
        "guidance=none engine=torch engine.dtype=bf16 train.batch=1280 train.micro_batch=2",
        "train.micro_batch=2",
        "engine.dtype=fp32",
    ),
    ("engine=torch engine.zero_stage=3", "engine.zero_stage=3", "engine.backend=deepspeed"),
    ("engine=torch engine.zero_stage=2", "engine.zero_stage=2", "engine.backend=deepspeed"),
    ("train.weight_decay=-1", "train.weight_decay=-1.0", "in [0.0"),
    ("train.betas=[0.9,1.0]", "train.betas[1]=1.0", "1.0)"),
    ("train.ema_halflife=[]", "train.ema_halflife=[]", "at least one"),
    ("train.ema_halflife=[0]", "train.ema_halflife[0]=0", "1 or more"),
    ("train.ema_halflife=[5,5]", "train.ema_halflife=[5, 5]", "drop one"),
    ("seed=-1", "seed=-1", "take 0 to"),
    ("engine.timeout_s=0", "engine.timeout_s=0", "1 or more"),
    ("model.patch=3", "model.patch=3", "take model.patch=2"),
    ("model.patch=0", "model.patch=0", "1 or more"),
    ("model.patch=-2", "model.patch=-2", "1 or more"),
    ("model.heads=0", "model.heads=0", "1 or more"),
    ("model.width=0", "model.width=0", "1 or more"),
    ("model.depth=-1", "model.depth=-1", "1 or more"),
    ("model.size=0", "model.size=0", "1 or more"),
    ("model.channels=0", "model.channels=0", "1 or more"),
    ("model.time=noisy", "model.time='noisy'", "did you mean 'noise'"),
    ("model.norm=bogus", "model.norm='bogus'", "layer, rms"),
    ("model=unet_digits guidance=none model.groups=0", "model.groups=0", "1 or more"),
    ("model=unet_digits guidance=none model.base=-32", "model.base=-32", "1 or more"),
    ("model=unet_digits guidance=none model.heads=0", "model.heads=0", "1 or more"),
    ("model=unet_digits guidance=none model.mult=[1,-2]", "model.mult[1]=-2", "1 or more"),
    ("guidance.prototype_width=-1", "guidance.prototype_width=-1", "1 or more"),
    ("guidance=labels data.classes=-1", "data.classes=-1", "0 or more"),
    ("model.heads=3", "model.heads=3", "model.width=64; take model.heads=2"),
    ("model.self_condition=9", "model.self_condition=9", "take model.self_condition=3"),
    ("model.self_condition=0", "model.self_condition=0", "take model.self_condition=1"),
    ("model.self_condition=4", "model.self_condition=4", "take model.self_condition=block_3"),
    (
        "model.self_condition=block_4",
        "model.self_condition=block_4",
        "take model.self_condition=block_3",
    ),
    ("model.self_condition=-1", "model.self_condition=-1", "take model.self_condition=1"),
    ("model.self_condition=2.5", "model.self_condition='2.5'", "take model.self_condition=block_2"),
    ("model.self_condition=blok_2", "model.self_condition='blok_2'", "did you mean 'block_2'"),
    ("model.self_condition=true", "model.self_condition='true'", "block_1 to block_3"),
    (
        "model=unet_digits model.self_condition=out_4",
        "model.self_condition=out_4",
        "take model.self_condition=out_3",
    ),
    (
        "model=uvit_digits model.self_condition=mid",
        "model.self_condition=mid",
        "model.cls_token=true, and drop it",
    ),
    (
        "model=unet_sgdm_32 model.self_condition=mid",
        "model.self_condition=mid",
        "such as model=unet_ddpm",
    ),
    (
        "model=unet_sgdm_released_64 guidance=none model.self_condition=mid",
        "model.self_condition=mid",
        "the form imagen",
    ),
    ("model.self_add=direct", "model.self_add=direct", "model.self_condition=LAYER"),
    ("model.self_condition=2 model.self_add=always", "model.self_add='always'", "adaptive, direct"),
    ("model.size=16", "model.size=16", "set it to 8"),
    ("model.channels=3", "model.channels=3", "set it to 1"),
    ("data.shape=[1,8,4]", "data.shape=[1, 8, 4]", "H = W"),
    (
        "cluster.environment.AWS_SECRET_ACCESS_KEY=x",
        "cluster.environment.AWS_SECRET_ACCESS_KEY",
        "export",
    ),
    (
        "cluster.environment.OMP_NUM_THREADS=two",
        "cluster.environment.OMP_NUM_THREADS=two",
        "a whole number, 1 or more",
    ),
    ("data.mix=[other] evaluation=none", "data.weights=[]", "each of data.mix"),
    ("data.weights=[1]", "data.weights=[1.0]", "each of data.mix"),
    ("data.mix=[other] data.weights=[1,0] evaluation=none", "data.weights=[1.0, 0.0]", "positive"),
    ("data.mix=[other] data.weights=[1,2]", "evaluation.protocol=fd_digits", "evaluation=none"),
    (
        "data.mix=[other] data.weights=[1,2] evaluation=none guidance=sidecar guidance.ids=x guidance.groups=3",
        "guidance.source=sidecar",
        "guidance=online",
    ),
    ("data.threads=0", "data.threads=0", "1 or more"),
    ("data.decoders=-1", "data.decoders=-1", "0 or more"),
    ("data.cache=/x data.cache_bytes=0", "data.cache_bytes=0", "1 or more"),
    ("data.cache_bytes=5", "data.cache_bytes=5", "data.cache=FOLDER"),
    ("data.cache=''", "data.cache", "FOLDER"),
    ("data.on_damage=ignore", "data.on_damage='ignore'", "fail, substitute"),
    ("data.on_damage=substitute data.damaged=2", "data.damaged=2.0", "[0.0, 1.0]"),
    ("data.on_damage=substitute data.damaged=nan", "data.damaged=nan", "[0.0, 1.0]"),
    ("data.damaged=0.5", "data.damaged=0.5", "data.on_damage=substitute"),
    ("data.shape=[3,16,16]", "evaluation.protocol=fd_digits", "evaluation=none"),
    ("data.root=''", "data.root is empty", "data.root="),
    ("runs=s3://bucket/runs", "runs='s3://bucket/runs'", "file system"),
    ("name=a/b", "name='a/b'", "letters"),
    ("name=..", "name='..'", "letters"),
    ("name=''", "name=''", "letters"),
    ("guidance.layer=5", "guidance.layer=5", "take guidance.layer=4"),
    ("guidance.prototype_width=null guidance.layer=99", "guidance.layer=99", "1 to 4"),
    ("guidance.layer=0", "guidance.layer=0", "1 to 4"),
    ("guidance.pooling=cls", "model.cls_token is false", "model.cls_token=true"),
    ("guidance.switch=0", "guidance.switch=0.0", "between 0 and 1"),
    ("guidance.switch=1", "guidance.switch=1.0", "between 0 and 1"),
    ("guidance.switch=0.9999", "guidance.switch=0.9999", "guidance.switch=0.999 or less"),
    ("guidance.view=training guidance.mask=[0.3,0.2]", "guidance.mask=[0.3, 0.2]", "low <= high"),
    ("guidance.noise_time=1.5", "guidance.noise_time=1.5", "[0.0, 1.0]"),
    ("guidance.noise_time=1", "guidance.noise_time=1.0", "below 1"),
    ("path=ddpm guidance.noise_time=1", "guidance.noise_time=1.0", "below 1"),
    ("path=vp guidance.noise_time=1", "guidance.noise_time=1.0", "below 1"),
    ("guidance.teacher_refresh=1000", "guidance.teacher_refresh=1000", "1024"),
    ("guidance.groups=1", "guidance.groups=1", "2 or more"),
    ("guidance.epsilon=0", "guidance.epsilon=0.0", "positive number"),
    ("guidance.drop=1", "guidance.drop=1.0", "1.0)"),
    ("sampler.steps=0", "sampler.steps=0", "1 or more"),
    ("sampler.interval=[-0.1,0.5]", "sampler.interval=[-0.1, 0.5]", "low <= high"),
    ("sampler.g=-1", "sampler.g=-1.0", "[0.0"),
    ("evaluation.samples=0", "evaluation.samples=0", "1 or more"),
    ("evaluation.in_flight=0", "evaluation.in_flight=0", "1 or more"),
    ("evaluation.attempts=0", "evaluation.attempts=0", "1 or more"),
    ("cluster.mem_gb=0", "cluster.mem_gb=0.0", "positive"),
    ("cluster.timeout_min=0", "cluster.timeout_min=0", "1 or more"),
    ("guidance=labels data.classes=0", "data.classes > 0, not 0", "guidance=online"),
    ("guidance=sidecar", "guidance.source=sidecar", "guidance.ids=FOLDER"),
    ("guidance=sidecar guidance.ids=a", "guidance.groups=0", "1 or more"),
    ("guidance=sidecar guidance.ids='' guidance.groups=2", "guidance.ids=''", "file system"),
    ("guidance=sidecar guidance.ids=s3://a/b guidance.groups=2", "s3://a/b", "file system"),
    ("guidance=sidecar guidance.layout=a", "guidance.channels=0", "1 or more"),
    ("guidance=sidecar guidance.dense=a guidance.width=-1", "guidance.width=-1", "1 or more"),
    ("guidance=digits_kmeans guidance.channels=1", "guidance.channels=1", "drop it"),
    ("guidance=digits_kmeans guidance.width=8", "guidance.width=8", "drop it"),
    (
        "guidance=sidecar guidance.dense=a guidance.width=3 guidance.groups=2",
        "guidance.groups=2",
        "guidance.ids=FOLDER",
    ),
    (
        "guidance=sidecar guidance.layout=a guidance.channels=3 guidance.groups=2",
        "guidance.groups=2",
        "guidance.groups=3",
    ),
    ("guidance=digits_kmeans guidance.drop=1", "guidance.drop=1.0", "[0.0, 1.0)"),
    ("guidance=digits_kmeans guidance.drop=nan", "guidance.drop=nan", "[0.0, 1.0)"),
    ("guidance=digits_kmeans guidance.shuffle=1.5", "guidance.shuffle=1.5", "[0.0, 1.0]"),
    ("guidance=digits_kmeans guidance.shuffle=-0.1", "guidance.shuffle=-0.1", "[0.0, 1.0]"),
    (
        "model=uvit_digits guidance=sidecar guidance.dense=a guidance.width=32",
        "guidance.width=32",
        "its own width, 64",
    ),
    ("guidance=none evaluation.prior=uniform", "prior=uniform", "prior=empirical"),
    (
        "evaluation.expected=[{metric:fd_digits,value:4,source:''}]",
        "evaluation.expected[0].source=''",
        "give source=NAME, the paper",
    ),
    (
        "evaluation.expected=[{metric:fd_digitz,value:4,source:here}]",
        "evaluation.expected[0].metric='fd_digitz'",
        "did you mean 'fd_digits'?",
    ),
    (
        "guidance=digits_kmeans guidance.layout=a guidance.channels=1 evaluation.prior=uniform",
        "prior=uniform",
        "prior=empirical",
    ),
    (
        "guidance=sidecar guidance.dense=a guidance.width=3 evaluation.prior=uniform",
        "prior=uniform",
        "prior=empirical",
    ),
    ("guidance=digits_patch evaluation.prior=uniform", "prior=uniform", "prior=empirical"),
]


@pytest.mark.parametrize(("settings", "names", "cure"), BAD, ids=[row[0] for row in BAD])
def test_a_broken_law_names_field_value_and_cure(settings: str, names: str, cure: str) -> None:
    with pytest.raises(UserError) as raised:
        validate(compose([*DIGITS, *settings.split(" ")]))
    message = str(raised.value)
    assert names in message and cure in message
    assert "\n" not in message


@pytest.mark.parametrize("experiment", sorted(experiments()))
def test_every_experiment_holds_as_it_stands(experiment: str) -> None:
    nodes = 4 if experiment.startswith("in1k") else 1
    validate(compose([f"experiment={experiment}", "cluster=slurm", f"nodes={nodes}"]))


@pytest.mark.parametrize("guidance", options("guidance"))
@pytest.mark.parametrize("experiment", sorted(experiments()))
def test_every_guidance_composes_with_every_experiment(experiment: str, guidance: str) -> None:
    """Nothing that one choice leaves behind is an unknown key for the next."""
    settings = [f"experiment={experiment}", "cluster=slurm", f"guidance={guidance}"]
    if guidance.endswith("online") or guidance.startswith("sgfm"):
        settings += ["guidance.pooling=flat", "guidance.layer=2"]
    if guidance == "sidecar":
        settings += ["guidance.ids=notes", "guidance.groups=10"]
    if guidance == "digits_patch" and experiment == "digits_edm":
        settings += ["model=uvit_digits"]  # a UNet has no patches
    validate(compose(settings))


@given(steps=st.integers(1, 3000), switch=st.floats(0.001, 0.9999))
def test_both_stages_have_a_step_at_least(steps: int, switch: float) -> None:
    base = ONLINE
    images = steps * base.train.batch
    cadence = dict.fromkeys(("images", "log_every", "snapshot_every", "checkpoint_every"), images)
    train = replace(base.train, warmup_images=0, **cadence)
    config = replace(base, train=train, guidance=replace(base.guidance, switch=switch))
    if config.guidance.switch_images(config.train) < images:
        validate(config)
        return
    with pytest.raises(UserError) as raised:
        validate(config)
    cure = re.search(r"take guidance\.switch=([\d.]+) or less$", str(raised.value))
    assert (cure is None) == (steps == 1)
    if cure is not None:
        validate(replace(config, guidance=replace(config.guidance, switch=float(cure.group(1)))))


def test_auto_must_be_decided_first() -> None:
    with pytest.raises(UserError, match="cluster=auto"):
        validate(compose(["experiment=digits_dit"]))


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 10_000),
    nodes=st.integers(1, 8),
    gpus=st.integers(1, 8),
    micro=st.integers(1, 64) | st.none(),
)
def test_the_batches_it_suggests_do_divide(
    batch: int, nodes: int, gpus: int, micro: int | None
) -> None:
    unit = nodes * gpus * (micro or 1)

    def attempt(size: int) -> str | None:
        counts = ("images", "log_every", "snapshot_every", "checkpoint_every", "batch")
        train = replace(
            SLURM.train, micro_batch=micro, warmup_images=0, **dict.fromkeys(counts, size)
        )
        cluster = replace(SLURM.cluster, gpus_per_node=gpus)
        try:
            validate(replace(SLURM, nodes=nodes, cluster=cluster, train=train))
        except UserError as error:
            return str(error)
        return None

    message = attempt(batch)
    assert (message is None) == (batch % unit == 0)
    if message is not None:
        suggested = re.search(r"take train\.batch=(\d+)(?: or (\d+))?$", message)
        assert suggested is not None
        for size in filter(None, suggested.groups()):
            assert abs(int(size) - batch) < unit
            assert attempt(int(size)) is None


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("evaluation=fd_effnet evaluation.samples=1", "take 20 or more"),
        ("evaluation=fd_timm", "give evaluation.net=resnet50.a1_in1k"),
        ("evaluation=fdd evaluation.reference=a.npz evaluation.shards=b", "leave the other out"),
        ("evaluation=fid_clean evaluation.reference=s3://a/b.npz", "all nodes share"),
        ("evaluation=fid_clean evaluation.net=resnet18", "protocol=fd_timm"),
        ("evaluation.ranks=2", "protocol=fd_effnet"),
    ],
)
def test_a_protocol_of_images_that_cannot_be_taken_is_refused(words: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        validate(compose(["experiment=digits_dit", "cluster=local", *words.split()]))


def test_the_flagship_without_evaluation_is_valid() -> None:
    for words in ([], ["evaluation=none"], ["evaluation=fid_clean"]):
        validate(compose(["experiment=in1k_dit", "nodes=4", "cluster=slurm", *words]))
