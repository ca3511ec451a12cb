"""`guidance=sgfm_code` is the published code's: forward, step, ids, average, first weights, against a re-derivation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.compose import compose
from selfguide import snapshot
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import RankInfo
from selfguide.guidance.labels import drop_images
from selfguide.guidance.online import PROTOTYPES, OnlineSource
from selfguide.guidance.prototypes import assign
from selfguide.networks.head import PrototypeHead
from selfguide.networks.official import adopt
from selfguide.networks.student import Student, build_student
from selfguide.sampling.groups import queried_prototypes
from selfguide.snapshot import Snapshot
from selfguide.spec.averages import AverageSpec
from selfguide.spec.config import Config, InitConfig, OnlineGuidance
from selfguide.spec.config.laws import Neutral, fields_of
from selfguide.spec.corrections import CORRECTIONS, Correction, kept_from_before
from selfguide.spec.files import read_config
from selfguide.spec.initial_weights import SCRATCH, agree
from selfguide.spec.run import Lease, RunFolder
from selfguide.spec.validate import validate
from selfguide.training import publish
from selfguide.training.job import build_state
from selfguide.training.loop import advance
from selfguide.training.telemetry import Telemetry
from selfguide.training.work import Training, prepare_batch
from shards import storage
from shards.format.header import Header
from tests.guard.runs import FIXTURES
from tests.selfguide import plain_sgfm, published
from tests.selfguide.snapshots import write_snapshot
from tests.selfguide.test_loop import Given
from tests.selfguide.test_official import init, small, uvit_weights

BATCH, STEPS, SWITCH = 32, 6, 3
NET: dict[str, Any] = {"patch": 2, "heads": 2}


def config(*more: str) -> Config:
    """SGFM's code on a small U-ViT, with its optimiser and without clipping."""
    made = compose([
        "experiment=digits_uvit", "cluster=local", "evaluation=none", "engine=torch", "cluster.gpus_per_node=1",
        "guidance=sgfm_code", "path=sgfm", "model.time=data", "model.cls_token=true", "model.width=32", "model.depth=2",
        "model.heads=2", "guidance.groups=12", f"train.images={BATCH * STEPS}", f"train.batch={BATCH}",
        "guidance.window=32", "train.learning_rate=1e-3", "train.clip=1e9", "train.warmup_images=0",
        "train.log_every=32", f"train.snapshot_every={BATCH * STEPS}", f"train.checkpoint_every={BATCH * STEPS}", *more,
    ])  # fmt: skip
    validate(made)
    return made


def begun(folder: Path, made: Config) -> Training:
    """The real loop on one process, before its first step; weights are spread so that nothing is near zero."""
    student = build_student(made, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name != PROTOTYPES:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    settle(student)
    state = build_state(made, RankInfo(0, 0, 1), student, [], SCRATCH)
    run = RunFolder(folder)
    return Training(
        made, RankInfo(0, 0, 1), state, Given(iter(arrays())), build_objective(made.path),
        Normaliser.of(Header(kind="image", shift=8.0, scale=0.125)), {},
        Telemetry(run, 1, RankInfo(0, 0, 1), made.train.images), Lease(run, 1),
    )  # fmt: skip


def settle(student: Student, scale: float = 1.0) -> None:
    """Fills BatchNorm's buffers with statistics of real features: fresh ones give every image one group."""
    assert student.head is not None
    x = scale * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        read = student.features(x, torch.full((64,), 0.15), Condition.unconditional(64))
        student.head.norm.momentum = 1.0
        student.head.train()(read)
    student.head.norm.momentum = 0.1


def arrays() -> list[dict[str, np.ndarray]]:
    """A batch for each step, as a stream has them."""
    made = []
    for start in range(0, BATCH * STEPS, BATCH):
        ordinal = np.arange(start, start + BATCH)
        drawn = np.random.default_rng(start)
        x = drawn.uniform(0, 16, (BATCH, 1, 8, 8)) * drawn.uniform(0, 2, (BATCH, 1, 1, 1))
        x = x.astype(np.float32)
        made.append({"x": x, "ordinal": ordinal, "position": ordinal})
    return made


def plain(job: Training) -> plain_sgfm.Trainer:
    """Their trainer at the same weights."""
    weights = plain_sgfm.theirs(job.state.engine.module.state_dict())
    rate = job.state.averages.specs[0].rate
    assert rate is not None
    return plain_sgfm.Trainer(
        weights, first_of_stage_2=SWITCH, lr=job.config.train.learning_rate, rate=rate, **NET
    )


def both_step(
    job: Training, theirs: plain_sgfm.Trainer, number: int, ids: Tensor | None = None
) -> None:
    batch = prepare_batch(job, arrays()[number])
    dropped = drop_images(job.config.seed, batch.position, 0.15)
    theirs.step(batch.x0.double(), batch.eps.double(), 1 - batch.tau.double(), dropped, ids)
    advance(job)


def masters(job: Training) -> dict[str, Tensor]:
    return plain_sgfm.theirs(
        job.state.engine.layout.split(job.state.engine.gather(job.state.engine.masters))
    )


@pytest.mark.parametrize("preset", ["sgfm_code", "sgfm_paper"])
@pytest.mark.parametrize("level", ["image", "patch"])
def test_the_forward_is_the_sources_in_both_modes(level: str, preset: str, tmp_path: Path) -> None:
    """In its four states: with rows, null, unconditional (zeros in the paper), and training or not."""
    job = begun(tmp_path, config(f"guidance={preset}", f"guidance.level={level}"))
    student = job.state.engine.module.double()
    x, tau = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.linspace(0.01, 0.99, 6)
    t, shape = 1 - tau.double(), (6, 32) if level == "image" else (6, 16, 32)
    rows = torch.randn(shape, dtype=torch.float64)
    given = Condition.of(**{"dense" if level == "image" else "patch": rows})
    for training in (True, False):
        student.train(training)
        weights = plain_sgfm.theirs(student.state_dict())
        nothing = weights["unconditional_embed"] * (preset == "sgfm_code")
        for condition, y in (
            (given, rows),
            (given.null(), weights["null_cfg_embed"].expand(shape)),
            (Condition.unconditional(6), nothing.expand(shape)),
        ):
            u, scores, _ = plain_sgfm.forward(weights, x, t, y, training=training, **NET)
            with torch.no_grad():
                found = student(x, tau, condition)
            assert u.std() > 0.1 and found.scores is not None
            torch.testing.assert_close(-found.prediction, u, rtol=0, atol=2e-6)
            torch.testing.assert_close(found.scores.double(), scores, rtol=0, atol=2e-6)


# the code takes 1e-4, which six steps would not show
FAST = "guidance.teacher_rate=0.25"


def test_steps_ids_and_average_are_the_codes_through_both_stages(tmp_path: Path) -> None:
    """Six steps of AdamW, three of them with ids: rows are averaged before they are unit again."""
    job = begun(tmp_path, config(FAST))
    theirs, named, ids = plain(job), 0, None
    for number in range(STEPS):
        if number > SWITCH:
            batch = prepare_batch(job, arrays()[number])
            (source,) = job.state.components
            assert isinstance(source, OnlineSource) and job.state.teaching is not None
            features = source.extract(batch, job.state.teaching)
            ids = assign(job.state.teaching, features)
            assert job.state.teaching.head is not None
            with torch.no_grad():
                best, second = job.state.teaching.head(features).topk(2).values.T
            # rounding decides for a row that lies between two prototypes; half of all rows lead by 0.05 or more
            moved = ids != theirs.name_ids(batch.x0.double(), batch.eps.double())
            assert moved.sum() <= 2 and (best - second)[moved].lt(1e-3).all()
            named = max(named, len(ids.unique()))
        both_step(job, theirs, number, ids)
        rows = theirs.w["prototypes.weight"]
        unit = rows / rows.norm(dim=1, keepdim=True)
        torch.testing.assert_close(masters(job)["prototypes.weight"], unit, rtol=0, atol=5e-6)
    assert named > 2
    average = plain_sgfm.theirs(job.state.averages.weights(0))
    # Adam makes steps of rounding where a gradient is next to nothing: in single numbers, and in a shift before
    # BatchNorm
    for name in average.keys() - {"projection_head.0.bias"}:
        far = (average[name] - theirs.ema[name]).abs()
        assert far.max() < 1e-4 and (far > 5e-6).double().mean() < 1e-3, name
    # of rows that had left the sphere
    lengths = theirs.ema["prototypes.weight"].norm(dim=1)
    assert (lengths - 1).abs().max() > 1e-4
    # BatchNorm's statistics that name ids are those of the switch
    taught = dict(job.state.teaching.named_buffers())  # type: ignore[union-attr]
    for name, value in zip(("mean", "var"), plain_sgfm.BUFFERS, strict=True):
        found = taught[f"head.norm.running_{name}"].double()
        # a bias that rounding moved shifts the mean by as much
        torch.testing.assert_close(found, theirs.ema[value], rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("setting", "far"),
    [
        ("guidance.prototype_gradient=tangent", 1e-4),
        ("guidance.codes_over=counted", 1e-5),
        ("guidance.mean_over=counted", 1e-7),
    ],
)
def test_another_form_takes_another_step(setting: str, far: float, tmp_path: Path) -> None:
    job = begun(tmp_path, config(setting))
    theirs = plain(job)
    for number in range(3):
        both_step(job, theirs, number)
    rows = theirs.w["prototypes.weight"]
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert (masters(job)["prototypes.weight"] - unit).abs().max() > far


def test_rows_of_other_lengths_name_other_ids_where_they_are_read_as_they_are() -> None:
    """Of 20,000 features among 300 prototypes whose averages are 0.97 to 1 long, a few percent."""
    torch.manual_seed(0)
    lengths = torch.linspace(0.97, 1.0, 300)[torch.randperm(300)]
    heads = [PrototypeHead(64, 32, 64, 300, ids=ids).eval() for ids in ("unit", "averaged")]
    with torch.no_grad():
        heads[0].prototypes.mul_(lengths[:, None])
    heads[1].load_state_dict(heads[0].state_dict())
    features = torch.randn(20_000, 64)
    with torch.no_grad():
        unit, averaged = (head(features).argmax(1) for head in heads)
        products = heads[1].embed(features).double() @ heads[1].prototypes.double().T
    assert torch.equal(averaged, products.argmax(1))
    assert 0.005 < (unit != averaged).double().mean().item() < 0.2


# --- how it begins


def test_first_weights_are_the_codes_for_each_kind_of_module() -> None:
    """Means and stds; depth and width only repeat them."""
    made = config("model=uvit_l_2", "data.shape=[1,8,8]", "model.depth=2", "model.width=256",
                  "model.heads=16", "guidance.groups=300")  # fmt: skip
    student = build_student(made, 0)
    weights = plain_sgfm.theirs(student.state_dict())
    tokens = ("cls_token", "null_cfg_embed", "unconditional_embed")
    fan = {"patch_embed.proj": 4, "final_layer": 9}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if stem in fan:  # torch's own: uniform, of weights and bias alike
            assert tensor.abs().max() <= fan[stem] ** -0.5
            assert tensor.numel() == 1 or published.has_spread(tensor, (3 * fan[stem]) ** -0.5), (
                name
            )
        elif "norm" in name or stem == "projection_head.1":
            assert (tensor == float(kind in ("weight", "running_var"))).all(), name
        elif kind == "bias":
            assert not tensor.any(), name
        elif name == "prototypes.weight":
            torch.testing.assert_close(tensor.norm(dim=1), torch.ones(300).double())
            assert published.has_spread(tensor, 256**-0.5)
        else:
            assert published.has_spread(tensor, 1.0 if name in tokens else 0.02), name


def test_what_no_field_asks_for_begins_as_before() -> None:
    """Drawing tokens and head anew moves no other weight of the backbone."""
    old = ["guidance.token_std=null", "guidance.head_std=null"]
    now, before = (build_student(config(*more), 0).state_dict() for more in ([], old))
    drawn = {name for name in now if not torch.equal(now[name], before[name])}
    assert drawn >= {"backbone.cls", "backbone.condition.null", "backbone.condition.unconditional"}
    assert all(name.startswith(("backbone.c", "head.")) for name in drawn)
    assert before["backbone.cls"].std() == pytest.approx(0.02, rel=0.4)


def test_official_weights_give_neither_positions_nor_a_null_row() -> None:
    weights = uvit_weights(channels=3)
    for setting, taken in (("fresh", False), ("taken", True)):
        begin = init("uvit")
        begin = replace(begin, guidance=replace(begin.guidance, official_tokens=setting))
        ours = small("uvit_l_2", classes=0, dense=32, cls_token=True)
        fresh = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
        found = adopt(ours, weights, begin)
        kept = {n for n, tensor in ours.state_dict().items() if torch.equal(tensor, fresh[n])}
        assert found.saw_labels, "the blocks did see labels"
        tokens = {"positions", "condition.null", "condition.unconditional"}
        assert kept == ({"cls"} if taken else {"cls"} | tokens)


def test_a_snapshot_whose_tokens_began_otherwise_is_one_to_begin_from() -> None:
    begin = InitConfig(source="snapshot", path="s", time="relearn")
    agree(config("guidance.token_std=null"), replace(config(), init=begin))


# --- what is published


def test_a_snapshot_names_ids_as_its_trainer_did(tmp_path: Path) -> None:
    """With the buffers of the switch, and query images in noise of their own."""
    job = begun(tmp_path, config(FAST))
    for _ in range(STEPS):
        advance(job)
    lease = Lease(RunFolder(tmp_path), RunFolder(tmp_path).open_attempt())
    folder = lease.run.snapshot(job.state.images)
    publish.publish(folder, job.state, job.config, job.data, job.rank_info, lease)
    found = snapshot.load(folder)
    assert found.average.key == "rate-0.25" and not list(kept_from_before(found.config))
    teacher = job.state.teaching
    assert teacher is not None
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(found.student.state_dict()[name], tensor), name
    live = job.state.engine.module.state_dict()["head.norm.running_mean"]
    assert not torch.equal(live, teacher.state_dict()["head.norm.running_mean"])


def test_each_query_image_meets_noise_of_its_own() -> None:
    made = config()
    for setting in ("own", "shared"):
        guidance = replace(made.guidance, query_noise=setting)
        student = build_student(replace(made, guidance=guidance), 0)
        torch.manual_seed(5)
        for parameter in student.backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        settle(student, 0.15)
        student.eval()
        asked = Snapshot(
            student, replace(made, guidance=guidance), 0, {"told": True, "p": [1.0]}, {}, "",
            AverageSpec(halflife=1), False, {},
        )  # fmt: skip
        same = torch.zeros(64, 1, 8, 8)
        numbers = torch.arange(64)
        found = queried_prototypes(asked, same, numbers)
        assert (len(found.unique()) > 1) == (setting == "own")
        alone = queried_prototypes(asked, same[:1], torch.tensor([17]))
        assert alone == found[17], "whatever else is asked"
        again = queried_prototypes(asked, same[:2], torch.tensor([5, 5]))
        assert again[0] == again[1]


# --- what was written before


def old_config() -> Config:
    """guidance=sgfm_code as it was written to disk before it was corrected."""
    return read_config(FIXTURES / "configs" / "04.yaml")


def test_a_config_of_before_keeps_its_values_and_says_so() -> None:
    was = old_config()
    (said,) = kept_from_before(was)
    assert isinstance(was.guidance, OnlineGuidance)
    assert (was.guidance.id_rows, was.guidance.prototype_gradient) == ("unit", "tangent")
    assert "guidance=sgfm_code" in said
    assert "guidance.id_rows=unit" in said and "guidance.id_rows=averaged" in said
    assert "guidance.teacher_rate=null" in said and "guidance.teacher_rate=0.0001" in said


@pytest.mark.parametrize("each", CORRECTIONS, ids=lambda each: f"{each.group}={each.name}")
def test_every_correction_is_what_its_choice_sets_today(each: Correction) -> None:
    words = ["experiment=digits_dit", "cluster=local", f"{each.group}={each.name}"]
    if each.group == "model":  # where its fields are read
        words += [
            "path=ddpm",
            "data.shape=[4,64,64]",
            "guidance=labels",
            *(["model.qk_norm=true"] if "qk_bias" in each.now else []),
        ]
    made = compose(words)
    group = getattr(made, each.group)
    assert {name: getattr(group, name) for name in each.now} == dict(each.now)
    assert {name: getattr(group, name) for name in each.known_by} == dict(each.known_by)
    assert not list(kept_from_before(made))
    neutral = {
        field.name: law.value
        for field in fields_of(type(group))
        if field.name in each.now and (law := field.law(Neutral))
    }
    old = neutral | each.was
    assert old.keys() == each.now.keys()
    before = replace(made, **{each.group: replace(group, **old)})
    (said,) = kept_from_before(before)
    assert all(f"{each.group}.{name}=" in said for name in each.now)


def test_a_snapshot_of_before_loads_under_its_old_values_and_says_so(
    tmp_path: Path, digits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = [
        "id_rows=unit", "prototype_gradient=tangent", "teacher_rate=null", "snapshot_buffers=student",
        "token_std=null", "head_std=null", "official_tokens=taken", "query_noise=shared",
    ]  # fmt: skip
    old = [f"guidance.{field}" for field in fields]
    common = ["guidance=sgfm_code", "guidance.pooling=flat", "guidance.prototype_width=8"]
    folder = write_snapshot(tmp_path / "old", digits, *common, *old)
    text = (folder / "config.yaml").read_text().splitlines()
    names = {field.partition("=")[0] for field in fields}
    kept = [line for line in text if line.strip().partition(":")[0] not in names]
    assert len(kept) < len(text)
    manifest = storage.read_complete(folder, verify="hashes")
    assert manifest is not None
    rewritten = tmp_path / "rewritten"
    rewritten.mkdir()
    for file in folder.glob("*.safetensors"):
        (rewritten / file.name).write_bytes(file.read_bytes())
    (rewritten / "config.yaml").write_text("\n".join(kept) + "\n")
    more = {name: manifest[name] for name in ("images", "guidance", "data", "saw_labels", "origin")}
    storage.publish_folder(rewritten, extra=more)
    found = snapshot.load(rewritten)
    guidance = found.config.guidance
    assert isinstance(guidance, OnlineGuidance) and guidance.id_rows == "unit"
    assert found.average.key == "20000" or isinstance(found.average.plain, int)
    assert "guidance=sgfm_code was corrected since" in caplog.text
    caplog.clear()
    snapshot.load(write_snapshot(tmp_path / "new", digits, *common))
    assert not caplog.text
