"""From what a user types to a `Config`: Hydra composes the YAML tree, our schema decides what is a key.

The group `model` needs no YAML: each row of `selfguide.spec.sizes.TABLE` is a choice.

Hydra only knows the keys that the YAML of the chosen groups happens to spell out; the dataclasses know them all.
So every `key=value` is checked against the dataclasses first and then forced into the composition.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import logging
import re
import typing
from collections.abc import Sequence
from typing import Any

from launcher import own_data, sites, typed
from launcher.choices import GROUPS, experiments, folder_name, options, shipped, values
from launcher.keys import holds_text, known_keys, names_anything, sections, types_of
from selfguide.spec.config import ClusterConfig, Config, build
from selfguide.spec.config.evaluation import PINS
from selfguide.spec.config.laws import Formerly, fields_of
from selfguide.spec.files import plain
from selfguide.spec.sizes import CORRECTED, TABLE
from selfguide.spec.suggest import nearest
from shards.errors import UserError

# keys of which one sweep has one value
_ONE = ("runs", "follow", "dry_run", "cluster", "cluster.kind")
# settings of a net's weights, by what they are the weights of
_OF_NET = {"net": ("weights", "sha256"), "weights": ("sha256",)}


# what Hydra composes for a choice of groups, without single keys, and what data hold
Frames = dict[tuple[str, ...], Any]


def compose(overrides: Sequence[str], frames: Frames | None = None) -> Config:
    """The configuration that `experiment=... key=value ...` stands for.

    Reads `configs`, the folders of `launcher.sites`, and the manifest of `data.root` where that is given without what
    it holds.

    Args:
        frames: keeps what is composed, for further calls that choose the same groups: a tenth of a second each.

    Raises:
        UserError: unknown experiment, option or key (with the nearest name), or a value that cannot be read.
    """
    given = [_known(text) for text in overrides]
    if not any(key == "experiment" for key, _ in given):
        known = ", ".join(experiments())
        raise UserError(f"no experiment given: add experiment=NAME; known: {known}")
    values = _hydra([text for _, text in given], frames)
    _check_experiment(values, [text for key, text in given if key == "experiment"][-1])
    _belongs(given, values)
    own_data.describe(values, {key for key, _ in given}, frames)
    _expect(values, [text.removeprefix("++") for _, text in given])
    return build(Config, values)


def compose_cluster(overrides: Sequence[str]) -> ClusterConfig:
    """Where `cluster=NAME cluster.key=value ...` means, for work that is no experiment.

    Raises:
        UserError: another key than the cluster's, an unknown one, or a value that cannot be read.
    """
    for text in overrides:
        if not re.match(r"cluster(\.[\w-]+)*=", text):
            raise UserError(f"{text!r} says nothing of a cluster: give KEY=VALUE of cluster.KEY")
    given = [text for _, text in map(_known, overrides)]
    # the frame asks for one, and none of them says anything of clusters
    values = _hydra([f"experiment={options('experiment')[0]}", *given])
    return build(ClusterConfig, values["cluster"], "cluster")


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with `key=value ...` in it; the choice of a group, such as cluster=local, replaces its part.

    Raises:
        UserError: an unknown option or key (with the nearest name), or a value that cannot be read.
    """
    given = [_known(text) for text in overrides]
    choices = {folder_name(choice): choice for choice in options("experiment")}
    frame = f"experiment={choices.get(config.experiment, options('experiment')[0])}"
    composed, values = _hydra([frame, *(text for _, text in given)]), plain(config)
    for key, _ in given:
        if key.partition(".")[0] == "evaluation":
            _change_evaluations(key, composed, values)
            continue
        *parts, last = key.split(".")
        source, target = composed, values
        for part in parts:
            source, target = source[part], target[part]
        target[last] = source[last]
    _belongs(given, values)
    return build(Config, values)


def combinations(
    overrides: Sequence[str], *, several: bool = True
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Returns each run's settings, and of these the ones that are swept, by Hydra's own grammar.

    Several keys with lists mean their product, the last one changing fastest.

    Args:
        several: refuses settings of which none has several values.

    Raises:
        UserError: no key has several values, or one's values cannot be listed.
    """
    choices, swept = [], set()
    for text in overrides:
        key, _, value = text.partition("=")
        listed = _swept(key, value)
        if listed is None:
            choices.append([text])
            continue
        if key in _ONE:
            raise UserError(f"{text}: a sweep has one {key}; submit one sweep for each")
        swept.add(len(choices))
        choices.append([f"{key}={each}" for each in listed])
    if several and not swept:
        raise UserError("-m without several values: write KEY=A,B or KEY=range(0,3), or drop -m")
    return [
        (each, tuple(text for number, text in enumerate(each) if number in swept))
        for each in itertools.product(*choices)
    ]


def _swept(key: str, value: str) -> list[str] | None:
    """The values that are swept, as they can be typed; None of a single one.

    Commas divide text as well, outside of quotes and brackets.

    Raises:
        UserError: they cannot be read or listed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    texts = typed.divided(value) if holds_text(key) else []
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        if not parsed.is_sweep_override():
            return None
        values = parsed.value()
    except HydraException as error:
        if holds_text(key):
            return texts if len(texts) > 1 else None
        raise UserError(
            f"cannot read '{key}={value}': give values as {key}=A,B, a list in [brackets], and text in 'quotes'"
        ) from error
    if isinstance(values, Glob):
        return list(values.filter(options(key)))
    if parsed.is_discrete_sweep():
        return texts if len(texts) > 1 else list(parsed.sweep_string_iterator())
    raise UserError(
        f"{key}={value}: only values that can be listed make runs; name them: {key}=A,B"
    )


def _change_evaluations(key: str, composed: dict[str, Any], values: dict[str, Any]) -> None:
    """Puts `evaluation=` or one key of it into `values`: a choice replaces all protocols, a key is each one's."""
    field = key.partition(".")[2]
    if not field:
        values["evaluation"] = composed["evaluation"]
        values["more_evaluations"] = composed.get("more_evaluations", [])
        return
    for each in (values["evaluation"], *values["more_evaluations"]):
        each[field] = composed["evaluation"][field]
        # those of the former net; of others they are what is typed beside, or are found anew
        for name in _OF_NET.get(field, ()):
            each[name] = composed["evaluation"].get(name)
        for name, pin in PINS.items():
            # the hash is that of other shards or another file, and is read anew, also where somebody types it
            if field == name or (field == pin and each[name]):
                each[pin] = None


def without_group(overrides: Sequence[str], group: str) -> list[str]:
    """`overrides` less the choice of `group`; `group.key=value` stays."""
    return [text for text in overrides if text.partition("=")[0] != group]


def _known(text: str) -> tuple[str, str]:
    """(key, override for Hydra) of one argument."""
    key, equals, value = text.partition("=")
    if key.startswith("-"):
        raise UserError(
            f"{text!r} is not an option here: settings are written key=value; see --help"
        )
    if not equals:
        raise UserError(f"{text!r} is not key=value; see --help")
    if key == "cluster":
        ours = shipped(key)
        path = sites.of(value, ours)
        return key, f"cluster={sites.register(path, ours)}" if path else text
    if key == "evaluation" and value.startswith("["):
        return key, f"{key}=[{','.join(_protocols(value))}]"
    if key in GROUPS:
        choices = options(key)
        if value not in choices:
            raise UserError(
                f"{key}={value} does not exist{nearest(value, choices)}; known: {', '.join(choices)}{sites.absent()}"
            )
        return key, text
    free = names_anything(key.rpartition(".")[0])
    if key.rpartition(".")[2] == "compat" and not free:
        raise UserError(
            f"{text}: forms of a paper or its code are choices of a group, and none is called compat; take "
            "guidance=sgfm_paper or guidance=sgfm_code, and drop it"
        )
    key, value = _current(key, value)
    text = f"{key}={value}"
    known = known_keys()
    if key not in known and not free:
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise UserError(f"{key!r} is a part, not a setting; it has: {', '.join(inside)}")
        raise UserError(f"unknown key {key!r}{_nearest_key(key, known)}")
    return key, f"++{text}"


def _protocols(value: str) -> list[str]:
    """The names in `[a,b]`, choices of `evaluation=`, each once."""
    names = [name.strip() for name in value.strip("[]").split(",") if name.strip()]
    for name in names:
        _known(f"evaluation={name}")
    if len(set(names)) < len(names) or not names or (len(names) > 1 and "none" in names):
        raise UserError(
            f"evaluation={value} names protocols that score a run, each once: give evaluation="
            f"[{','.join(dict.fromkeys(n for n in names if n != 'none')) or 'fd_digits'}]"
        )
    return names


def _current(key: str, value: str) -> tuple[str, str]:
    """Key and value as they are called today. Former names are taken for one release, with a warning."""
    for part, cls in sections():
        for field in fields_of(cls):
            former = field.law(Formerly)
            if former is not None and key == f"{part}.{former.name}":
                name, value = f"{part}.{field.name}", former.new(value)
                logging.getLogger(__name__).warning(
                    f"{key} is now {name}: write {name}={value}; the former name goes with the next release"
                )
                return name, value
    return key, value


def _nearest_key(key: str, known: list[str]) -> str:
    """The known key closest in spelling; a bare name may also mean the same name inside a part."""
    part, _, name = key.rpartition(".")
    inside = [each for each in known if each.rpartition(".")[2] == name]
    if inside:
        return f"; did you mean '{inside[0]}'?"
    # what two keys have in common by their part makes them no nearer
    parts = {each.rpartition(".")[0] for each in known}
    meant = part if part in parts else next(iter(difflib.get_close_matches(part, parts, n=1)), None)
    names = {each.rpartition(".")[2]: each for each in known if each.rpartition(".")[0] == meant}
    others = {each.rpartition(".")[2]: each for each in known}
    # where the part is spelt right, the setting is one of its own
    for table in (names,) if part in parts - {""} else (names, others):
        if found := re.search("'(.*)'", nearest(name, table)):
            return f"; did you mean '{table[found[1]]}'?"
    return (
        f"; {part} has: {', '.join(names)}"
        if part in parts - {""}
        else "; --help lists the common ones"
    )


def _hydra(overrides: list[str], frames: Frames | None = None) -> dict[str, Any]:
    """The composed mapping, interpolations resolved."""
    several = next((text for text in overrides if text.startswith("evaluation=[")), None)
    if several is not None:
        rest = [text for text in overrides if text != several]
        each = [
            _hydra([*rest, f"evaluation={name}"], frames)
            for name in several.partition("=")[2].strip("[]").split(",")
        ]
        return each[0] | {"more_evaluations": [other["evaluation"] for other in each[1:]]}
    # here, because most commands of the launcher compose nothing and Hydra costs a tenth of a second
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sites.searched_by_hydra()
    for name in TABLE:
        node = {"name": name, **CORRECTED.get(name, {})}
        ConfigStore.instance().store(group="model", name=name, node=node)
    try:
        with initialize_config_module(config_module="configs", version_base=None):
            frames = {} if frames is None else frames
            groups = tuple(text for text in overrides if not text.startswith("++"))
            if groups not in frames:
                frames[groups] = hydra_compose("config", overrides=list(groups))
            keys = [text.removeprefix("++") for text in overrides if text.startswith("++")]
            composed = _with_keys(frames[groups], keys)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_plain(str(error))) from error
    except RecursionError:
        raise UserError(
            f"{' '.join(groups)}: the defaults of a file lead back to the file itself; write names of the same group "
            "as `- NAME`, and choices of others as `- override /model: NAME`"
        ) from None
    return typing.cast("dict[str, Any]", values)


def _check_experiment(values: dict[str, Any], chosen: str) -> None:
    """Calls an experiment of somebody's by its file, and refuses one whose keys are not where they belong."""
    name = chosen.partition("=")[2]
    own = sites.files("experiment").get(name)
    if isinstance(values["experiment"], dict):
        raise UserError(
            f"experiment={name}: the first line of {own or name} must be `# @package _global_`, so that its keys are "
            "those of the whole config"
        )
    # one that begins from another would be called as that is
    if "/" in name or (own is not None and "experiment" not in sites.read(own, "")):
        values["experiment"] = folder_name(name)


def _expect(values: dict[str, Any], typed: list[str]) -> None:
    """Puts what was published of an experiment of a paper beside its evaluations, unless something is typed there."""
    chosen = {key: value for key, _, value in (text.partition("=") for text in typed)}
    if "/" not in chosen["experiment"] or "evaluation.expected" in chosen:
        return
    # no other experiment has any
    from selfguide.spec.published import expected

    several = (values["evaluation"], *values.get("more_evaluations", ()))
    protocols: list[str | None] = [*chosen.get("evaluation", "").strip("[]").split(",")]
    for evaluation, protocol in zip(several, protocols, strict=True):
        found = expected(chosen["experiment"], protocol or None, typed)
        evaluation["expected"] = [dataclasses.asdict(each) for each in found]


def _with_keys(frame: Any, settings: list[str]) -> Any:
    """A copy of what was composed with `key=value` forced into it, as Hydra itself does it for `++key=value`."""
    from omegaconf import OmegaConf

    composed = copy.deepcopy(frame)
    for text in settings:
        key, _, value = text.partition("=")
        OmegaConf.update(composed, key, _value(key, value), merge=True, force_add=True)
    return composed


def _value(key: str, text: str) -> Any:
    """What `key=text` means: the text itself where the key holds text, else a value of Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    hints = types_of(key)
    kind = typed.shape(hints)
    if kind is None:
        try:
            parsed = OverridesParser.create().parse_override(f"++{key}={text}")
        except HydraException as error:
            raise UserError(f"cannot read {key}={text}: {_expected(key)}") from error
        if parsed.is_sweep_override():
            raise UserError(
                f"{key}={text} is several values: {_expected(key)}, or -m for a run of each"
            )
        return parsed.value()
    if typed.optional(hints) and text.strip().lower() == "null":
        return None
    return typed.value(key, text, kind, [each.name for each in fields_of(Config)])


def _expected(key: str) -> str:
    """What to give as the value of a key that holds no text."""
    hints = [kind for hint in types_of(key) for kind in (hint, *typing.get_args(hint))]
    if any(typing.get_origin(hint) is tuple for hint in hints):
        return f"give a list as '{key}=[A,B]'"
    if known := values(key):
        return f"give one of: {', '.join(known)}"
    return "give one whole number" if float not in hints else "give one number"


def _plain(message: str) -> str:
    """Hydra's message as one line of ours, without its own names of the places that it searched."""
    message = message.partition("Config search path:")[0]
    lines = [line.strip() for line in message.splitlines()]
    first = [line for line in lines if line and "hydra.cc" not in line]
    cure = ""
    if "Interpolation" in message or "interpolation" in message:
        cure = (
            "; ${...} names a setting, as ${train.batch} does, or a variable of the environment: "
            "${oc.env:NAME,DEFAULT} where text stands, ${oc.decode:${oc.env:NAME,DEFAULT}} for a number"
        )
    return f"cannot read the settings: {' '.join(first)}{cure}".replace("++", "")


def _belongs(given: list[tuple[str, str]], values: dict[str, Any]) -> None:
    """Refuses a guidance key that the chosen source does not have, before it reads as a misspelling."""
    source = values["guidance"].get("source")
    # each source is also the name of a choice
    known = {
        typing.get_args(typing.get_type_hints(option)["source"])[0]: {
            spec.name for spec in dataclasses.fields(option)
        }
        for option in typing.get_args(typing.get_type_hints(Config)["guidance"])
    }
    for key, text in given if source in known else ():
        part, _, name = key.partition(".")
        if part == "guidance" and name and name not in known[source]:
            readers = [f"guidance={other}" for other, names in known.items() if name in names]
            raise UserError(
                f"'{text.removeprefix('++')}' means nothing for guidance.source={source}: drop it, or take "
                f"{' or '.join(readers)}"
            )
