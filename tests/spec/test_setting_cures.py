"""What a refusal of settings tells to give is taken: each such setting is typed as it is printed."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.choices import GROUPS
from launcher.compose import Frames, compose, known_keys
from launcher.keys import names_anything
from selfguide.spec.validate import validate
from shards.errors import UserError
from tests.spec.test_sampler_laws import BAD as SAMPLERS
from tests.spec.test_validate import BAD, DIGITS

FRAMES: Frames = {}
ROOT = Path(__file__).parents[2]
SLURM = ["experiment=digits_dit", "cluster=slurm"]
ON_SLURM = [
    "nodes=4 min_nodes=3",
    "nodes=2 min_nodes=3",
    "nodes=2 min_nodes=1 cluster.nodelist=n[1-2]",
    "nodes=2 min_nodes=1 guidance.queue=256",
    "nodes=2 min_nodes=1 cluster.restart=requeue",
    "nodes=3 cluster.gpus_per_node=2",
    "cluster.gres=gpu:2",
    "cluster.srun=[x]",
    "cluster.srun=[--nodes=2]",
    "cluster.warn_s=0",
    "cluster.exclusive=maybe",
    "cluster.modules=cuda",
]
MORE = [
    "path=ddpm sampler.name=ddim sampler.spacing=leading sampler.steps=300",
    "path=ddpm sampler.name=ddim sampler.steps=999 sampler.shift=3",
    "path=ddpm sampler.name=ddim sampler.spacing=log_snr",
    "path=ddpm sampler.name=euler_maruyama",
    "path.cosine=1",
    "path.cosine=1 path.prediction=eps",
    "engine.channels_last=true",
    "data.crop=true",
    "guidance.level=patch guidance.pooling=null model=unet_digits",
    "guidance.compat=paper",
    "guidance=none guidance.drop=0.1",
    "evaluation=[fd_digits,fd_digits]",
    "evaluation=[none,fd_digits]",
    "evaluation.metrics=[kid]",
    "evaluation=fd_effnet evaluation.metrics=[inception_score]",
    "evaluation=fd_effnet evaluation.metrics=[kid] evaluation.kid_size=100000",
    "evaluation=fd_effnet evaluation.metrics=[agreement] data.classes=0",
    "evaluation=probe evaluation.pooling=cls",
    "evaluation.ranks=2",
    "auxiliary.weight=0.5 auxiliary.layer=9",
    "auxiliary.weight=0.5 model.depth=1",
    "auxiliary.weight=0",
    "auxiliary.weight=0.5 model=unet_digits",
    "align.weight=0.2 align.layer=9",
    "align.weight=0.2 align.layer=3",
    "align.weight=0.2 model.depth=1",
    "model.self_condition=0",
    "model.self_condition=4",
    "model.self_condition=9",
    "model.self_condition=blok_2",
    "model.self_add=direct",
    "model=uvit_digits model.self_condition=2",
    "augment=edm data.flip=true",
    "augment=edm guidance=digits_patch",
    "augment.probability=0",
    "contrastive.weight=0.01 contrastive.feature=cls",
    "contrastive.weight=0.01 contrastive.layer=9",
    "contrastive.weight=0.01 train.micro_batch=2",
    "guidance=labels guidance.drop=0 contrastive.weight=0.01",
    "guidance=labels guidance.drop=0 sampler.g=2",
    "guidance=digits_online guidance.drop=0 sampler.g=0",
    "guidance=digits_online guidance.view=training augment=edm",
    "contrastive.noise_time=0.3",
    "contrastive.weight=0.01 contrastive.target=minimal contrastive.noise_time=0.3",
    "experiment=digits_guide sampler=dopri5 sampler.g=2 sampler.weak=routed",
    "align.weight=0.2 guidance=digits_online align.teacher_refresh=256",
    "align.weight=0.2 contrastive.weight=0.01 align.teacher_refresh=256",
    "sampler.g=2 sampler.weak=average-5000",
    "train.ema_halflife=[20000,5000] sampler.g=2 sampler.weak=average-7000",
    "contrastive.weight=0.01 contrastive.noise_time=0 path=vp",
    "guidance.noise_time=0 path=ddpm",
    "evaluation=probe_digits evaluation.noise_times=[0.2,0.9999] path=edm",
    "model.route=1",
    "model.route=0.5",
    "sampler.interval=[0.8,0.2]",
    "auxiliary.weight=0.5 sampler.g=2 sampler.weak=condition:0.5+head:0.6",
    "auxiliary.weight=0.5 sampler.g=2 sampler.weak=head+",
    "train.preview=4 sampler.g=2 sampler.weak=snapshot-64000",
    "init.labels=keep",
    "init.time=relearn",
    "init=official init.path=x.pt",
    "guidance=label",
    "experimnt=digits_uncond",
    "evaluation=fd_timm",
    "evaluation=fd_timm evaluation.net=resnet5O.a1_in1k",
    "evaluation=fd_timm evaluation.net=resnet50.a1_in1",
    "evaluation=fd_timm evaluation.net=resnet50",
    "train.betas=0.9",
    "train.batch=a",
    "follow=maybe",
    "train.learning_rate=fast",
]
TABLE = [(DIGITS, words) for words in [row[0] for row in (*BAD, *SAMPLERS)] + MORE]
TABLE += [(SLURM, words) for words in ON_SLURM]
# what a value must be is a cure by itself
_LAW = re.compile(
    r"\bmust (be|have)\b|is not one of|between 0 and 1|0 <= low <= high|give a weight to|at least one|letters, digits|"
    r"on a file system|below 1|run folder lives|export \w+ in the shell|number that its record names|null guides all|"
    r"drop one|of its own width|one place"
)
# what only a user can know: a file, a folder, a number of their data
_THEIRS = re.compile(r"=(FOLDER|ROOT|FILE|RUN|NAME|VALUE|K|M|P|\.\.\.|img-)")
_SETTING = re.compile(r"'(?P<quoted>[a-z_.]+=[^']*)'|(?P<bare>\b[a-z_.]+=[^\s,;)('`]+)")
_ADVICE = re.compile(r"[;:,] (?:or )?((?:take|set|give|drop|choose|leave) .*|did you mean .*)")
_OTHERS = re.compile(
    r"(?:(?: \([^)]*\))? or (?!fewer|less|more|an?\b|another|drop|take|leave|set)[\w.]+(?=$|[ ;,]))+"
)
_VALUE = {"a whole number": "3", "a number": "0.5", "true or false": "true"}


def refusal(words: list[str]) -> str:
    """Why these settings are refused; empty where they are taken."""
    try:
        validate(compose(words, FRAMES))
    except UserError as error:
        return str(error)
    return ""


def cures(words: list[str], message: str) -> Iterator[list[str]]:
    """The words after each cure that the message prints."""
    key = message.partition("=")[0].strip("'")

    def changed(*settings: str) -> list[str]:
        given = {setting.partition("=")[0] for setting in settings}
        return [*(word for word in words if word.partition("=")[0] not in given), *settings]

    found = _ADVICE.search(message)
    advice = found[1] if found else ""
    if meant := re.search(r"did you mean '([^']+)'", advice):
        unknown = re.search(r"unknown key '([^']+)'", message)
        if unknown:
            old = next(word for word in words if word.startswith(f"{unknown[1]}="))
            yield [*(word for word in words if word != old), meant[1] + old[len(unknown[1]) :]]
        else:
            yield changed(f"{key}={meant[1]}")
        return
    if "take that" in advice:
        yield changed(re.findall(r"read with (\S+=\S+)", message)[0])
    for each in _SETTING.finditer(advice):
        setting = each["quoted"] or each["bare"]
        if _THEIRS.search(setting):
            continue
        if together := re.match(r" with ([a-z_.]+=[^\s,;]+)", advice[each.end() :]):
            yield changed(setting, together[1])
            continue
        if ", and drop it" in advice:
            yield [word for word in changed(setting) if not word.startswith(f"{key}=")]
        elif not advice[: each.start()].endswith(" with "):
            yield changed(setting)
        # 126 or 129
        others = re.match(_OTHERS, advice[each.end() :])
        for other in others[0].split(" or ")[1:] if others else ():
            yield changed(f"{setting.partition('=')[0]}={other}")
    if number := re.search(r"take (\d+)(?: or|$| to)", advice):
        yield changed(f"{key}={number[1]}")
    if wanted := _VALUE.get(advice.removeprefix("give ")):
        yield changed(f"{key}={wanted}")
    if " set it to " in advice:
        yield changed(f"{key}={re.findall('set it to (.+)', advice)[0]}")
    without = [word for word in words if not word.startswith(f"{key}=")]
    if re.search(r"(?<!and )\bdrop it\b", advice) and len(without) < len(words):
        yield without


def holds(words: list[str], seen: tuple[str, ...]) -> bool:
    """Whether settings are taken, or are after some further cures, or as soon as a user names what is theirs."""
    said = refusal(words)
    if not said or _THEIRS.search(said) or _LAW.search(said):
        return True
    return said not in seen and any(holds(each, (*seen, said)) for each in cures(words, said))


@pytest.mark.parametrize(("base", "bad"), TABLE, ids=[words for _, words in TABLE])
def test_each_cure_of_a_setting_is_taken_as_printed(base: list[str], bad: str) -> None:
    words = [*base, *bad.split(" ")]
    message = refusal(words)
    found = [*cures(words, message)]
    assert message and (found or _THEIRS.search(message) or _LAW.search(message)), message
    for each in found:
        assert shlex.split(shlex.join(each)) == each and holds(each, (message,)), (each, message)


def texts(*folders: str) -> Iterator[tuple[str, str]]:
    """What messages say, less what is put into them: the constant text of each raise, and where it stands."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and node.exc is not None:
                    parts = [
                        each.value if isinstance(each.value, str) else "\0"
                        for each in ast.walk(node.exc)
                        if isinstance(each, ast.Constant)
                    ]
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", "".join(map(str, parts))


def test_every_setting_that_a_message_prints_is_a_setting() -> None:
    known = {*known_keys(), *GROUPS}
    for where, text in texts("launcher", "selfguide/spec"):
        for key in re.findall(r"(?<![\w.{-])([a-z_]+(?:\.[a-z_]+)+)=", text):
            assert key in known or names_anything(key.rpartition(".")[0]), (where, key)


def test_every_command_that_a_message_prints_is_a_command() -> None:
    found = 0
    for where, text in texts("launcher", "selfguide", "shards", "tools", "slurm"):
        for module, behind in re.findall(r"python -m ([a-z_.]+)([^`;:]*)", text):
            spec = importlib.util.find_spec(module.rstrip("."))
            assert spec is not None and spec.origin, (where, module)
            found += 1
            package = Path(spec.origin).parent
            sources = "".join(
                p.read_text() for p in [*package.glob("*.py"), *package.rglob("*.py")]
            )
            for flag in set(re.findall(r"(?<=\s)--[a-z][a-z-]+", behind)) - {"--help"}:
                assert flag in sources, (where, module, flag)
    assert found > 10
