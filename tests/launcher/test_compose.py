"""From what is typed to a Config: types as meant, and an answer to every misspelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.choices import experiments
from launcher.compose import Frames, compose, known_keys
from selfguide.spec.config import NoGuidance, OnlineGuidance
from selfguide.spec.files import read_config, to_yaml
from shards.errors import UserError

BAD = [
    ("", ["experiment=NAME", "digits_dit"]),
    ("experiment=digit_dit", ["experiment=digit_dit", "did you mean 'digits_dit'", "in1k_dit"]),
    ("experiment=imagenet", ["experiment=imagenet", "digits_uncond"]),
    ("experiment=digits_dit tran.batch=1", ["'tran.batch'", "did you mean 'train.batch'"]),
    ("experiment=digits_dit train.bacth=1", ["'train.bacth'", "did you mean 'train.batch'"]),
    ("experiment=digits_dit batch=1", ["'batch'", "did you mean 'train.batch'"]),
    ("experiment=digits_dit zzzz=1", ["'zzzz'", "--help"]),
    ("experiment=digits_dit model=dit_b2", ["model=dit_b2", "did you mean 'dit_b_2'"]),
    ("experiment=digits_dit train=3", ["'train' is a part", "train.batch"]),
    ("experiment=digits_dit nodes", ["'nodes' is not key=value"]),
    (
        "experiment=digits_dit train.batch=1,2",
        ["train.batch=1,2 is several values", "one whole number", "-m"],
    ),
    ("experiment=digits_dit train.batch=[1", ["cannot read train.batch=[1", "one whole number"]),
    ("experiment=digits_dit train.batch=many", ["train.batch='many' must be int"]),
    ("experiment=digits_dit train.batch=true", ["train.batch=True must be int"]),
    ("experiment=digits_dit train.batch=1.5", ["train.batch=1.5 must be int"]),
    ("experiment=digits_dit train.batch=${nothing}", ["nothing"]),
    ("experiment=digits_dit train.lr=1", ["'train.lr'", "did you mean 'train.learning_rate'"]),
    (
        "experiment=digits_dit evaluation.count=1",
        ["'evaluation.count'; evaluation has: protocol, samples"],
    ),
    ("experiment=digits_dit train.wd=1", ["'train.wd'", "did you mean 'train.weight_decay'"]),
    ("experiment=digits_dit train.zz=1", ["unknown key 'train.zz'; train has: images, batch"]),
    ("experiment=digits_dit data.mix=a", ["data.mix='a' must be a list", "'data.mix=[a]'"]),
    ("experiment=digits_dit engine.dtype=fp61", ["engine.dtype='fp61'", "bf16"]),
    ("experiment=digits_dit hydra.run.dir=x", ["'hydra.run.dir'"]),
    ("experiment=digits_dit guidance=none guidance.groups=3", ["guidance.source=none", "online"]),
    ("experiment=digits_dit ~train.batch=3", ["'~train.batch'"]),
]


@pytest.mark.parametrize(("typed", "parts"), BAD, ids=[row[0] for row in BAD])
def test_a_mistake_gets_one_line_with_the_cure(typed: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        compose(typed.split())
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_are_read_as_people_write_them() -> None:
    typed = [
        "train.learning_rate=1e-3",
        "train.images=256_000",
        "train.batch=1.28e2",
        "sampler.rtol=1e-5",
    ]
    config = compose(["experiment=digits_dit", *typed, "cluster.environment.OMP_NUM_THREADS=1"])
    assert config.train.learning_rate == 1e-3 and config.sampler.rtol == 1e-5
    assert (config.train.images, config.train.batch) == (256_000, 128)
    assert isinstance(config.train.images, int) and isinstance(config.train.batch, int)
    assert config.cluster.environment == {"OMP_NUM_THREADS": "1"}


def test_every_number_of_the_yaml_tree_has_its_type() -> None:
    config = compose(["experiment=in1k_dit"])
    assert config.train.images == 409_600_000 and config.train.learning_rate == 1e-4
    assert config.train.ema_halflife == (7_100_000,)
    assert isinstance(config.guidance, OnlineGuidance)
    assert (config.guidance.groups, config.guidance.teacher_refresh) == (5000, 10_240)


def test_the_three_digits_experiments_differ_in_guidance_alone() -> None:
    online, none, labels = (
        compose([f"experiment=digits_{name}"]) for name in ("dit", "uncond", "class")
    )
    assert online.train == none.train == labels.train and online.model == none.model == labels.model
    assert isinstance(none.guidance, NoGuidance) and labels.guidance.source == "labels"
    assert [c.experiment for c in (online, none, labels)] == [
        "digits_dit",
        "digits_uncond",
        "digits_class",
    ]


def test_keys_that_no_yaml_spells_out_are_known_all_the_same() -> None:
    typed = ["train.micro_batch=16", "cluster.partition=gpu", "guidance.mask=[0.1,0.2]", "name=x"]
    config = compose(["experiment=digits_dit", *typed])
    assert (
        config.train.micro_batch == 16 and config.cluster.partition == "gpu" and config.name == "x"
    )
    assert {"train.micro_batch", "guidance.groups", "guidance.drop", "nodes"} <= set(known_keys())


def test_a_config_survives_its_yaml(tmp_path: Path) -> None:
    for name in experiments():
        config = compose([f"experiment={name}", "cluster=slurm", "train.learning_rate=1e-5"])
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert read_config(tmp_path / "config.yaml") == config


def test_compose_with_kept_frames_is_what_hydra_composes() -> None:
    frames: Frames = {}
    for words in (
        ["experiment=digits_dit"],
        ["experiment=digits_dit", "seed=3", "train.learning_rate=2e-4"],
        ["seed=1", "experiment=in1k_dit", "model=dit_b_2", "cluster=slurm", "nodes=4", "seed=2"],
        ["experiment=in1k_dit", "cluster.environment.A='1'", "cluster.environment={B: x}"],
        ["experiment=digits_edm", "sampler.interval=[0.1,0.5]", "evaluation=none", "name='0123'"],
    ):
        assert compose(words, frames) == compose(words)
    assert len(frames) == 4
    with pytest.raises(UserError, match="cannot read"):
        compose(["experiment=digits_dit", "seed=[1"], frames)
