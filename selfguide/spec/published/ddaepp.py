"""Enhancing Diffusion Models Towards Unified Generative and Discriminative Learning (Xiang et al. 2025, DDAE++)."""

from __future__ import annotations

from collections.abc import Sequence

from selfguide.spec.metrics import METRICS
from selfguide.spec.published.row import Row

PAPER = (
    "DDAE++: Enhancing Diffusion Models Towards Unified Generative and Discriminative Learning, "
    "Xiang et al. 2025 (2505.10999)"
)
DIFFERS = (
    "The contrastive loss reads the layer that self-conditions, of a U-ViT [CLS] of the middle block, and its target "
    "the noise-time of the paper's probe. The paper gives neither temperature nor heads nor the target's view: 0.2, "
    "4096 and 256 are MoCo v3's for ViTs, and a view is mirrored and moved by up to an eighth of the edge.",
    "Non-leaky augmentation has EDM's probability, 0.12: the paper gives none. It mirrors every second image, so that "
    "`data.flip` is off beside it.",
    "Self-conditioned UNets and DiTs read the layer that the paper gives, out_8 where it gives out_7 to out_9 and, of "
    "CIFAR-100's out_6 and out_7, out_6 for EDM; the form is in docs/differences.md. Self-conditioned U-ViTs have "
    "[CLS].",
    "Accuracy is the linear probe of the layer and noise-time that a validation part chose, of the test split; the "
    "paper's is the best of the checkpoints at 800, 1000 and 1200 epochs.",
    "U-ViT's weight decay, 0.03, is U-ViT's own: the paper gives none. It acts on [CLS] and on neither biases nor "
    "positions, as the paper's does.",
    "fp32 in place of mixed precision on pixels.",
)
_CIFAR = ("cifar10", "cifar100")
_PROBED = {
    "32": "[ddaepp,probe_test]",
    "64": "[ddaepp,probe_test_64]",
    "dit": "[ddaepp,probe_test_latents]",
}
# EDM's loss is weighted by a learned uncertainty where images are augmented (table 8)
_AUGMENTED = ("augment=edm", "data.flip=false")
_UNCERTAIN = ("path.weighting=uncertainty", "path.uncertainty=normalised")
# the layer that conditions later ones and that the contrastive loss reads, by experiment; a U-ViT has [CLS]
_LAYERS = {
    **{f"{data}_{path}_pp": "out_8" for data in _CIFAR for path in ("ddpm", "edm", "flow")},
    **{f"{data}_ddpm": "out_6" for data in _CIFAR},
    "cifar10_edm": "out_7", "cifar10_flow": "out_7", "cifar100_edm": "out_6", "cifar100_flow": "out_7",
    "tiny_edm": "out_5", "in100_edm": "out_5",
    "in100_dit": "block_8", "in100_dit_labels": "block_8",
    "in256_dit": "block_9", "in256_dit_labels": "block_10",
}  # fmt: skip
# U-ViT in pixels on other paths than DDPM's, as those paths' UNets have them
_UNSTABLE = {
    "edm": ("path=edm", "model.time=log_sigma", "sampler=heun_edm", "sampler.steps=18", "sampler.clip=null"),
    "flow": ("path=rectified_flow", "sampler=dopri5", "sampler.steps=50", "sampler.clip=null"),
}  # fmt: skip
_SODA = "SODA (Hudson et al. 2024), which the paper rebuilt: another model, an encoder beside the denoiser"

# FID and accuracy, before and with self-conditioning
_PAIRS = {
    "ddpm": ((3.60, 90.34), (3.67, 90.94), (5.97, 62.06), (5.77, 63.55)),
    "edm": ((3.39, 91.41), (3.30, 91.07), (6.21, 63.68), (6.01, 65.35)),
    "flow": ((3.89, 90.67), (3.67, 90.91), (6.49, 60.84), (6.25, 62.83)),
    "ddpm_pp": ((2.98, 94.02), (2.75, 94.34), (4.43, 69.35), (4.01, 71.11)),
    "edm_pp": ((2.23, 94.83), (2.18, 94.85), (3.46, 71.09), (3.36, 71.61)),
    "flow_pp": ((2.54, 93.97), (2.42, 93.72), (4.07, 67.46), (4.29, 68.49)),
    "uvit": ((4.48, 93.67), (4.13, 94.30), (7.35, 70.66), (7.14, 72.04)),
}
# what is added to the plain row -> FID and accuracy; table 3's marks are read in their order
_ADDED: dict[tuple[str, str], dict[tuple[str, ...], tuple[float, float]]] = {
    ("cifar10", "edm"): {
        (): (3.39, 91.41), ("aug",): (3.32, 92.55), ("aug", "cl"): (3.42, 92.61),
        ("self",): (3.30, 91.07), ("self", "aug"): (3.08, 92.41), ("self", "aug", "cl"): (3.14, 92.97),
    },
    ("cifar100", "edm"): {
        (): (6.21, 63.68), ("aug",): (5.39, 66.28), ("aug", "cl"): (5.42, 67.63),
        ("self",): (6.01, 65.35), ("self", "aug"): (5.13, 68.65), ("self", "aug", "cl"): (5.25, 69.50),
    },
    ("cifar10", "edm_pp"): {
        (): (2.23, 94.83), ("aug",): (2.19, 95.24),
        ("self",): (2.18, 94.85), ("self", "aug"): (2.17, 95.33), ("self", "aug", "cl"): (2.14, 95.35),
    },
    ("cifar100", "edm_pp"): {
        (): (3.46, 71.09), ("aug",): (3.61, 71.14),
        ("self",): (3.36, 71.61), ("self", "aug"): (3.38, 73.29), ("self", "aug", "cl"): (3.35, 72.88),
    },
    ("cifar10", "uvit"): {
        (): (4.48, 93.67), ("aug",): (4.00, 95.14),
        ("self",): (4.13, 94.30), ("self", "aug"): (4.00, 95.34), ("self", "aug", "cl"): (4.35, 95.28),
    },
    ("cifar100", "uvit"): {
        (): (7.35, 70.66), ("aug",): (7.96, 72.85),
        ("self",): (7.14, 72.04), ("self", "aug"): (7.05, 73.58), ("self", "aug", "cl"): (6.88, 74.48),
    },
}  # fmt: skip
# epoch -> FID and IS unconditional; conditional; conditional and guided; each before and with self-conditioning
_EPOCHS = {
    20: ((44.06, 20.00), (43.21, 20.88), (31.46, 33.98), (29.83, 36.99), (11.80, 93.56), (10.11, 112.29)),
    40: ((36.75, 23.09), (35.22, 24.30), (22.11, 46.84), (21.05, 50.31), (7.17, 143.06), (6.79, 159.49)),
    60: ((32.38, 26.42), (31.31, 26.54), (18.35, 56.47), (17.53, 59.27), (6.28, 170.23), (6.20, 184.64)),
    80: ((30.34, 27.76), (29.57, 28.67), (16.41, 61.68), (16.13, 62.94), (6.09, 183.09), (6.08, 197.58)),
    90: ((29.69, 28.71), (28.85, 29.42), (16.01, 61.63), (15.30, 66.00), (6.10, 188.13), (6.11, 203.40)),
}  # fmt: skip
_SNAPSHOT = 12_811_264  # ten epochs of ImageNet


def _row(
    table: str,
    name: str,
    experiment: str | None,
    *overrides: str,
    found: Sequence[float] = (),
    scores: Sequence[str] = ("fid_adm", "linear_accuracy"),
    **rest: object,
) -> Row:
    """A row with FID and accuracy in percent, or the other `scores`."""
    numbers = {
        metric: value / 100 if METRICS[metric].form == "percent" else value
        for metric, value in zip(scores, found, strict=False)
    }
    return Row(
        paper="ddaepp",
        table=table,
        name=name,
        experiment=experiment,
        overrides=overrides,
        numbers=numbers,
        source=f"DDAE++, {table}, {name}" if numbers else "",
        **rest,  # type: ignore[arg-type]
    )


def _pair(
    table: str,
    name: str,
    experiment: str,
    size: str,
    before: Sequence[float],
    after: Sequence[float],
) -> tuple[Row, Row]:
    """The plain row, and the one with self-conditioning."""
    plain, ours = (
        _row(table, name + suffix, experiment, *more, found=found, protocol=_PROBED[size])
        for suffix, found, more in (("", before, ()), ("-self", after, _self(experiment)))
    )
    return plain, ours


def _settings(experiment: str, added: Sequence[str], **contrastive: str) -> tuple[str, ...]:
    """What is typed for `added`; `contrastive` changes settings of that loss."""
    words: tuple[str, ...] = ()
    if "aug" in added:
        words += (*_AUGMENTED, *(_UNCERTAIN if "_edm" in experiment else ()))
    if "self" in added:
        words += _self(experiment)
    if "cl" in added:
        words += _contrastive(experiment, **contrastive)
    # both of the last need a U-ViT's [CLS]
    return tuple(dict.fromkeys(words))


def _contrastive(name: str, **changed: str) -> tuple[str, ...]:
    """What makes a run of the experiment learn the contrastive loss, with some of its settings changed."""
    if name.endswith("_uvit"):
        # index 11 of DDPM's 1000
        settings = {"weight": "0.01", "feature": "cls", "noise_time": "0.011"}
    else:
        # sigma 0.06 of EDM
        settings = {"weight": "0.01", "layer": _LAYERS[name], "noise_time": "0.0565"}
    settings |= changed
    if settings.get("target") == "minimal":
        del settings["noise_time"]
    return tuple(f"contrastive.{key}={value}" for key, value in settings.items())


def _self(experiment: str) -> tuple[str, ...]:
    """What makes a run of the experiment self-conditioned."""
    name = experiment.removeprefix("ddaepp/")
    if name.endswith("_uvit"):
        # U-ViT's own std, where the row's is that of label rows
        return ("model.cls_token=true", "model.token_std=0.02")
    return (f"model.self_condition={_LAYERS[name]}",)


# path -> FID with a direct and an adaptive add
_ADDS = {"edm": (2.43, 2.21), "flow": (2.69, 2.42)}
# the contrastive loss's: experiment, what is changed of the run of table 3 with all three, FID and accuracy
_CHANGED: tuple[tuple[str, str, dict[str, str], tuple[float, float]], ...] = (
    ("head-plain", "cifar100_edm", {"head": "plain"}, (5.87, 69.01)),
    ("head-timed", "cifar100_edm", {}, (5.88, 69.50)),
    ("target-minimal-noise", "cifar100_edm", {"target": "minimal"}, (5.81, 68.76)),
    ("gamma-0.1", "cifar100_edm", {"weight": "0.1"}, (6.03, 69.08)),
    ("gamma-0.01", "cifar100_edm", {}, (5.88, 69.50)),
    ("gamma-0.001", "cifar100_edm", {"weight": "0.001"}, (5.96, 68.42)),
    ("target-pooled", "cifar100_uvit", {"feature": "pooled"}, (8.51, 73.15)),
    ("target-cls", "cifar100_uvit", {}, (7.37, 74.48)),
)


def _changed(name: str, experiment: str, changed: dict[str, str], found: Sequence[float]) -> Row:
    """A row of table 7 about the contrastive loss."""
    added = ("self", "aug", "cl")
    if changed:
        return _row(
            "table7",
            name,
            f"ddaepp/{experiment}",
            *_settings(experiment, added, **changed),
            found=found,
            protocol=_PROBED["32"],
            differs="which run it is of is inferred: CIFAR-100's with all three has such an accuracy",
        )
    run = f"{experiment.replace('_', '-')}-self-aug-cl"
    return _row(
        "table7",
        name,
        None,
        found=found,
        command=f"python -m tools.reproduce ddaepp table3 {run}",
        differs="the run of that row, inferred from its accuracy; table 3 has another FID",
    )


ROWS = (
    *(
        row
        for net, found in _PAIRS.items()
        for number, data in enumerate(_CIFAR)
        for row in _pair(
            "table2",
            f"{data}-{net}",
            f"ddaepp/{data}_{net}",
            "32",
            *found[2 * number : 2 * number + 2],
        )
    ),
    *(
        _row(
            "table3",
            "-".join((data, net, *added)),
            f"ddaepp/{data}_{net}",
            *_settings(f"{data}_{net}", added),
            found=found,
            protocol=_PROBED["32"],
        )
        for (data, net), rows in _ADDED.items()
        for added, found in rows.items()
    ),
    _row("table3", "cifar10-soda", None, scores=("linear_accuracy",), found=(80.00,), lacks=_SODA),
    *_pair("table4", "tiny-edm", "ddaepp/tiny_edm", "64", (22.46, 47.21), (21.82, 48.43)),
    *_pair("table4", "in100-edm", "ddaepp/in100_edm", "64", (23.37, 60.76), (22.21, 62.08)),
    *_pair("table4", "tiny-uvit", "ddaepp/tiny_uvit", "64", (20.54, 59.25), (19.26, 60.54)),
    *_pair("table4", "in100-uvit", "ddaepp/in100_uvit", "64", (18.14, 73.73), (17.62, 73.91)),
    _row("table4", "tiny-soda", None, scores=("linear_accuracy",), found=(54.90,), lacks=_SODA),
    _row("table4", "in100-soda", None, scores=("linear_accuracy",), found=(38.20,), lacks=_SODA),
    *_pair("table5", "in100-dit", "ddaepp/in100_dit", "dit", (21.33, 83.78), (20.68, 84.86)),
    *_pair(
        "table5", "in100-dit-labels", "ddaepp/in100_dit_labels", "dit", (6.68, 83.08), (6.67, 83.24)
    ),
    *_pair("table5", "in256-dit", "ddaepp/in256_dit", "dit", (29.69, 63.25), (28.85, 64.42)),
    *_pair("table5", "in256-dit-labels", "ddaepp/in256_dit_labels", "dit", (6.09,), (6.08,)),
    *(
        _row(
            "table5",
            f"{data}-latents",
            f"ddaepp/{data}_dit",
            protocol=_PROBED["dit"],
            scores=("linear_accuracy_input",),
            found=(accuracy,),
            differs="the probe of no net, which stands beside that of the model's layers",
        )
        for data, accuracy in (("in100", 63.56), ("in256", 40.04))
    ),
    *(
        _row(
            "table6",
            f"epoch{epoch}-{which}{suffix}",
            experiment := f"ddaepp/in256_dit{'' if which == 'none' else '_labels'}",
            *(_self(experiment) if suffix else ()),
            *(("sampler.g=1",) if which == "labels" else ()),
            scores=("fid_adm", "inception_score"),
            found=found[number],
            images=epoch // 10 * _SNAPSHOT,
        )
        for epoch, found in _EPOCHS.items()
        for number, (which, suffix) in enumerate(
            (which, suffix) for which in ("none", "labels", "guided") for suffix in ("", "-self")
        )
    ),
    *(
        _row(
            "section4.2",
            f"ema-{rate}",
            None,
            found=found,
            lacks="a run that it is of: the paper's text names neither its net nor its epochs",
            differs="one run keeps several averages (`train.ema_halflife`), and `python -m tools.probe RUN --ema 0 1 "
            "2` probes each of them",
        )
        for rate, found in (
            ("0.999", (9.17, 60.06)),
            ("0.9993", (8.99, 60.18)),
            ("0.9999", (8.81, 60.47)),
        )
    ),
    *(
        row
        for path, (direct, adaptive) in _ADDS.items()
        for row in (
            _row(
                "table7",
                f"{path}-direct",
                f"ddaepp/cifar10_{path}_pp",
                *_self(f"cifar10_{path}_pp"),
                "model.self_add=direct",
                found=(direct,),
                differs="which net it is of is inferred: CIFAR-10's large UNet has such numbers",
            ),
            _row(
                "table7",
                f"{path}-adaptive",
                None,
                found=(adaptive,),
                command=f"python -m tools.reproduce ddaepp table2 cifar10-{path}_pp-self",
                differs="the run of that row, of which table 2 has another number",
            ),
        )
    ),
    *(_changed(*row) for row in _CHANGED),
    _row(
        "section4.1",
        "overhead",
        None,
        command="python -m tools.bench models",
        differs="of self-conditioning, 1 % in the paper; with `--sizes all` of larger nets too",
    ),
    *(
        _row(
            "section5.1",
            f"uvit-{path}",
            "ddaepp/cifar10_uvit",
            *overrides,
            differs="the paper found it unstable, and prints no number",
        )
        for path, overrides in _UNSTABLE.items()
    ),
    _row(
        "figure3",
        "fid-against-accuracy",
        None,
        command="python -m tools.correlate fid_adm linear_accuracy --runs RUNS --figure figure3.png",
        differs="RUNS stands for the folder of the runs of one data set; `--literature FILE` sets the self-supervised "
        "methods of tables 3 to 5 beside them, with their sources",
    ),
    _row(
        "figure4",
        "accuracy-over-layers",
        None,
        command="python -m tools.probe RUN --pooling mean token --figure layers.png",
        differs="RUN stands for a run with a probe",
    ),
    _row(
        "figure5",
        "accuracy-over-layers-and-epochs",
        None,
        command="python -m tools.probe RUN --over-images --figure epochs.png",
        differs="RUN stands for a run with a probe",
    ),
    _row(
        "figure6",
        "loss",
        None,
        command="python -m launcher.board curve RUN --metric loss",
        differs="RUN stands for any of them",
    ),
    _row(
        "figure7",
        "side-by-side",
        None,
        command="python -m tools.sample RUN --grid runs=RUN,RUN --count 8 --out samples",
        differs="RUN stands for a run, and for the self-conditioned one beside it",
    ),
)
