"""Online guidance as a user sets it: presets of the published method, and what no field shows alone."""

from dataclasses import asdict

import pytest

from launcher.compose import compose
from selfguide.spec.config import OnlineGuidance
from selfguide.spec.sizes import architecture
from selfguide.spec.validate import validate
from shards.errors import UserError

PAPER = {
    "view": "training", "view_condition": "as_trained", "noise_time": 0.2, "mask": (0.15, 0.25),
    "unconditional": "zero", "drop": 0.1,
}  # fmt: skip
CODE = {
    "view": "training", "view_condition": "as_trained", "noise_time": 0.15, "mask": (0.1, 0.2), "drop": 0.15,
    "codes_over": "all", "mean_over": "all", "extraction_noise": "training", "teacher_buffers": "frozen",
    "condition_rows": "averaged", "id_rows": "averaged", "prototype_gradient": "plain", "unconditional": "embedding",
    "teacher_rate": 1e-4, "snapshot_buffers": "teacher", "token_std": 1.0, "head_std": 0.02, "official_tokens": "fresh",
    "query_noise": "own",
}  # fmt: skip
WITH_CLS = ["model.cls_token=true", "cluster=local"]


@pytest.mark.parametrize(("name", "said"), [("sgfm_paper", PAPER), ("sgfm_code", CODE)])
def test_presets_of_the_published_method_say_what_it_says_and_nothing_else(
    name: str, said: dict[str, object]
) -> None:
    config = compose(["experiment=digits_dit", f"guidance={name}", *WITH_CLS])
    validate(config)
    every_step = {"teacher_refresh": config.train.batch} if name == "sgfm_code" else {}
    assert asdict(config.guidance) == asdict(OnlineGuidance()) | said | every_step
    assert validate(compose(["experiment=in1k_dit", f"guidance={name}", "cluster=slurm"])) is None


def test_every_default_is_the_corrected_form() -> None:
    corrected = {
        "view": "extraction", "view_condition": "unconditional", "codes_over": "counted", "mean_over": "counted",
        "extraction_noise": "own", "teacher_buffers": "student", "condition_rows": "unit", "unconditional": "embedding",
        "queue": 0, "revive": 0.0, "level": "image", "id_rows": "unit", "prototype_gradient": "tangent",
        "teacher_rate": None, "snapshot_buffers": "student", "token_std": None, "head_std": None,
        "official_tokens": "taken", "query_noise": "shared",
    }  # fmt: skip
    for name in ("online", "digits_online", "in1k_online"):
        settings = [f"guidance={name}", *WITH_CLS]
        given = asdict(compose(["experiment=digits_dit", *settings]).guidance)
        assert {field: given[field] for field in corrected} == corrected


@pytest.mark.parametrize("model", ["dit_digits", "uvit_digits"])
def test_patches_are_conditioned_where_the_network_takes_them(model: str) -> None:
    config = compose(
        ["experiment=digits_dit", f"model={model}", "guidance=digits_patch", "cluster=local"]
    )
    validate(config)
    net = architecture(config)
    assert net.accepts == {"patch"} and net.dense_patch == 64


BAD = [
    ("guidance=digits_patch model=unet_digits", "guidance.level=patch", "image, or a DiT or U-ViT"),
    ("guidance=digits_patch guidance.pooling=flat", "guidance.pooling=flat", "level=image only"),
    ("guidance.mask=[0.1,0.2]", "guidance.mask=[0.1, 0.2]", "view=training only"),
    ("guidance.codes_over=all", "guidance.codes_over=all", "view=training only"),
    ("guidance.mean_over=all", "guidance.mean_over=all", "view=training only"),
    (
        "guidance.view_condition=as_trained",
        "guidance.view_condition=as_trained",
        "view=training only",
    ),
    ("guidance.queue=-1", "guidance.queue=-1", "0 or more"),
    ("guidance.revive=1", "guidance.revive=1.0", "[0.0, 1.0)"),
    ("guidance.revive=nan", "guidance.revive=nan", "[0.0, 1.0)"),
    ("guidance.condition_rows=unti", "'unti'", "did you mean 'unit'"),
    ("guidance.id_rows=averaged", "guidance.id_rows=averaged", "condition_rows=averaged or"),
    (
        "guidance.snapshot_buffers=teacher",
        "guidance.snapshot_buffers=teacher",
        "teacher_buffers=frozen only",
    ),
    ("guidance.teacher_rate=0", "guidance.teacher_rate=0.0", "(0.0, 1.0]"),
    ("guidance.teacher_rate=1.5", "guidance.teacher_rate=1.5", "(0.0, 1.0]"),
    ("guidance.token_std=0", "guidance.token_std=0.0", "positive number"),
    ("guidance.head_std=-1", "guidance.head_std=-1.0", "positive number"),
    ("guidance.query_noise=fresh", "guidance.query_noise='fresh'", "shared, own"),
    (
        "guidance=labels guidance.id_rows=averaged",
        "guidance.id_rows=averaged",
        "take guidance=online",
    ),
    (
        "guidance=none guidance.teacher_rate=1e-4",
        "guidance.teacher_rate=1e-4",
        "guidance.source=none",
    ),
    ("guidance=sidecar guidance.query_noise=own", "guidance.query_noise=own", "drop it"),
    (
        "guidance=labels guidance.compat=code",
        "guidance.compat=code",
        "guidance=sgfm_paper or guidance=sgfm_code",
    ),
    ("compat=paper", "compat=paper", "guidance=sgfm_paper or guidance=sgfm_code"),
    ("guidance.compat=code", "guidance.compat=code", "guidance=sgfm_paper or guidance=sgfm_code"),
]


@pytest.mark.parametrize(("settings", "names", "cure"), BAD, ids=[row[0] for row in BAD])
def test_a_broken_law_names_field_value_and_cure(settings: str, names: str, cure: str) -> None:
    with pytest.raises(UserError) as raised:
        validate(compose(["experiment=digits_dit", "cluster=local", *settings.split(" ")]))
    assert names in str(raised.value) and cure in str(raised.value)


def test_an_epsilon_of_any_size_is_taken() -> None:
    validate(compose(["experiment=digits_dit", "cluster=local", "guidance.epsilon=0.005"]))
