"""Where a run's weights begin, as far as it can be checked without torch: the laws of `init`, and the weights' hash.

The hash, not the path, belongs to what a run is. Names and shapes in a file are compared here; its numbers, and all of
a .pt file that torch before 1.6 wrote, when training begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from selfguide.spec import pickled
from selfguide.spec.architecture import Architecture
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, PathConfig
from selfguide.spec.files import read_config
from selfguide.spec.official import FORMS, Contents, Training, contents
from selfguide.spec.pickled import unwrapped
from selfguide.spec.retention import deletion
from selfguide.spec.run import complete, image_folder
from selfguide.spec.sizes import TABLE, architecture
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.uvit import UViTArchitecture
from shards import storage
from shards.errors import UserError

SCRATCH: Mapping[str, Any] = {"source": "scratch", "saw_labels": False}
SAFE, PICKLED = ".safetensors", (".pt", ".pth", ".bin", ".ckpt")
# what a net may have otherwise than the snapshot it begins from: its condition, its tokens, labels of augmentation, and
# what weights it never saw, or hardly: first weights are replaced, and the index that fp32 missed is 3e-5 away
_FREE = (
    *("classes", "dense", "dense_patch", "cls_token", "token_std", "time", "dropout"),
    # routed networks have the weights of dense ones, and their names
    *("plain_init", "whole_index", "augment", "route"),
)


def validate_init(config: Config, net: Architecture) -> None:
    """The laws between `init` and the rest; reads no file.

    Raises:
        UserError: the first that does not hold, with its cure.
    """
    init = config.init
    if init.source == "scratch":
        return
    if not (init.path or "").strip():
        what = "RUN/snapshots/img-<images>" if init.source == "snapshot" else "FILE"
        raise UserError(f"init.source={init.source} needs weights; give 'init.path={what}'")
    if storage.is_remote(str(init.path)):
        raise UserError(
            f"init.path={init.path}: weights are read from a file system that all nodes share; copy them there"
        )
    if init.labels == "keep" and not net.classes:
        raise UserError(
            "init.labels=keep, and this network is not conditioned on labels; set init.labels=drop, or guidance=labels"
        )
    if init.source == "official":
        _official(config, net)


def _official(config: Config, net: Architecture) -> None:
    init = config.init
    if init.form is None:
        raise UserError(
            f"init.source=official needs to know whose names the file has; give init.form={' or '.join(FORMS)}"
        )
    form = FORMS[init.form]
    if Path(str(init.path)).suffix not in (SAFE, *PICKLED):
        raise UserError(
            f"init.path={init.path} is not one of {', '.join((SAFE, *PICKLED))}; give a checkpoint's file"
        )
    if not isinstance(net, form.family):
        fit = [name for name, other in FORMS.items() if isinstance(net, other.family)]
        cure = f"take init.form={' or '.join(fit)}, or " if fit else ""
        raise UserError(
            f"init.form={init.form} holds the weights of a {form.title}, and model.name={config.model.name} is "
            f"another family; {cure}choose a model of that family"
        )
    for field, value in form.switches.items():
        if getattr(net, field) != value:
            raise UserError(
                f"model.{field}={getattr(net, field)}, and a published {form.title} has {value}; set "
                f"model.{field}={str(value).lower()}, or another model"
            )
    _same_training(form.trained, config, net)


def _same_training(trained: tuple[Training, ...], config: Config, net: Architecture) -> None:
    """Time, path and prediction are those of the weights, unless they are to be learned anew."""
    init, mine = config.init, training_of(config.path, net)
    if init.time == "relearn":
        return
    fed = [each for each in trained if each.time == net.time]
    if not fed:
        names = " or ".join(each.time for each in trained)
        raise UserError(
            f"model.time={net.time}, and the weights of init.path={init.path} were fed {names}; set "
            f"model.time={trained[0].time}, or init.time=relearn to let training adapt them"
        )
    if mine not in fed:
        raise UserError(
            f"{mine}, and the weights of init.path={init.path} learned {fed[0]}; set {fed[0]}, or init.time=relearn "
            "to let training adapt them"
        )


def training_of(path: PathConfig, net: Architecture) -> Training:
    """What a run on `path` teaches `net`; sigma_min moves what is learned by 1e-4 at most, so it may differ."""
    made = Training(net.time, path.name, path.prediction)
    if path.name == "ddpm":
        made = made._replace(betas=path.betas)
    return made._replace(sigma_data=path.sigma_data) if path.prediction == "edm" else made


def official_training(config: Config, net: Architecture) -> Training:
    """What the weights of an official file learned: as their net is fed time; where ours is fed anew, as published."""
    trained = FORMS[str(config.init.form)].trained
    time = TABLE[config.model.name].time if config.init.time == "relearn" else net.time
    return next((each for each in trained if each.time == time), trained[0])


def check_weights(config: Config) -> str | None:
    """The sha256 of the weights that the run begins from, once they are known to fit; None from scratch.

    Raises:
        UserError: no such weights, or weights of another network.
    """
    init, net = config.init, architecture(config)
    if init.source == "scratch":
        return None
    path, where = Path(str(init.path)), f"init.path={init.path}"
    if init.source == "snapshot":
        manifest, theirs = read_snapshot(path, verify="sizes")
        agree(theirs, config)
        return ema_sha256(manifest, theirs)
    if not path.is_file():
        raise UserError(
            f"{where} is not a file; give the checkpoint's path, or to go on with a run, name=RUN"
        )
    shapes = unwrapped(_header(path, where)) if path.suffix == SAFE else pickled.shapes(path)
    if shapes is not None:
        contents_of(config, shapes, net)
    return storage.sha256(path)


def contents_of(
    config: Config, shapes: Mapping[str, tuple[int, ...]], net: Architecture
) -> Contents:
    """What an official file with these shapes holds; its label table must fit where it is kept.

    As many classes as the model was published with are the likeliest; a table that is kept may be of this run's.
    """
    init, where = config.init, f"init.path={config.init.path}"
    classes: tuple[int, ...] = (TABLE[config.model.name].classes,)
    if init.labels == "keep":
        classes = (*classes, net.classes)
    found = contents(shapes, str(init.form), net, where, classes)
    if init.labels == "keep" and found.classes != net.classes:
        null = " and a null row" if found.null else ""
        raise UserError(
            f"{where} has {found.classes} classes{null}, this network {net.classes}; set init.labels=drop, or train "
            "on its classes"
        )
    return found


def _header(path: Path, where: str) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open  # needs NumPy, and a dry run does not

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # SafetensorError, or what the file system says
        raise UserError(
            f"{where} is no whole safetensors file ({error}); fetch it again"
        ) from error


def begins_fresh(config: Config) -> tuple[str, ...]:
    """What the run has and the snapshot that it begins from has not, a sentence each.

    Tokens that are new change the network's prediction a little. All else leaves it the snapshot's: what stands beside
    it changes nothing, and what stands in it begins as zeros.
    """
    init = config.init
    folder = Path(init.path or "")
    if init.source != "snapshot" or not (folder / "config.yaml").is_file():
        return ()
    theirs = read_config(folder / "config.yaml")
    net, its = architecture(config), architecture(theirs)
    where, found = f"the snapshot in init.path={init.path}", []
    if net.self_condition and not its.self_condition:
        found.append(f"model.self_condition={net.self_condition} begins as zeros: {where} has none")
    tokens = {"cls_token": getattr(net, "cls_token", False)}
    # of other networks its labels are added to an embedding, as zeros
    tokens["augment"] = isinstance(net, UViTArchitecture) and bool(net.augment)
    for token, here in tokens.items():
        if here and not getattr(its, token, False):
            what = "model.cls_token=true" if token == "cls_token" else "augment"
            found.append(
                f"{what}: its token is new to the network, whose prediction it changes a little: {where} has none"
            )
    for name, settings in config.components.items():
        layer, other = settings.reads(net), theirs.components.get(name)
        if layer is None:
            continue
        if other is None:
            found.append(f"{name}: what it trains beside the network begins anew: {where} has none")
        elif (was := other.reads(its)) != layer:
            found.append(
                f"{name}: what it trains beside the network begins anew: in {where} it read layer {was}, and here "
                f"{layer}"
            )
        elif other.parameters(its) != settings.parameters(net):
            found.append(
                f"{name}: what it trains beside the network begins anew: in {where} it is of other sizes"
            )
    return tuple(found)


def read_snapshot(folder: Path, verify: storage.Verify) -> tuple[dict[str, Any], Config]:
    """The manifest and the config of a published snapshot.

    Raises:
        UserError: the folder holds none, or not all of it.
    """
    manifest = storage.read_complete(folder, verify=verify)
    if gone := deletion(folder):
        left = [f"init.path={folder.with_name(image_folder(n))}" for n in complete(folder.parent)]
        raise UserError(
            f"init.path={folder}: {gone}; take {' or '.join(left[-2:]) or 'a snapshot of another run'}"
        )
    if manifest is None or not (folder / "config.yaml").is_file():
        raise UserError(
            f"init.path={folder} is not a complete snapshot; give a folder RUN/snapshots/img-<images>, or to go on "
            "with a run, name=RUN"
        )
    return manifest, read_config(folder / "config.yaml")


def ema_sha256(manifest: Mapping[str, Any], config: Config) -> str:
    """Of a snapshot's first average, which is what a run begins from."""
    name = averages_of(config)[0].file
    return next(file["sha256"] for file in manifest["files"] if file["name"] == name)


def agree(their_config: Config, config: Config) -> None:
    """A snapshot's network and ours differ in nothing but their condition, and learn the same.

    Raises:
        UserError: they do not; names the field and both values.
    """
    init, theirs, ours = config.init, architecture(their_config), architecture(config)
    where = f"the snapshot in init.path={init.path}"
    if type(theirs) is not type(ours):
        raise UserError(
            f"{where} is of another family of models; choose a model of its family, or another snapshot"
        )
    free: tuple[str, ...] = _FREE if init.labels == "drop" else _FREE[1:]
    if theirs.self_condition is None:
        free += ("self_condition", "self_add")  # it begins as zeros
    for field in (f.name for f in fields(ours) if f.name not in free):
        mine, its = getattr(ours, field), getattr(theirs, field)
        if field == "classes" and mine != its:
            raise UserError(
                f"{where} has a table of {its} labels and this network of {mine}; set init.labels=drop"
            )
        if mine != its:
            raise UserError(
                f"{where} has model.{field}={_typed(its)}, and this run {_typed(mine)}; set "
                f"model.{field}={_typed(its)}, or take another snapshot"
            )
    if isinstance(ours, UNetArchitecture) and isinstance(theirs, UNetArchitecture):
        _same_embedding(theirs, ours, where)
    _same_training((training_of(their_config.path, theirs),), config, ours)


def _typed(value: Any) -> Any:
    return "null" if value is None else value


def _same_embedding(theirs: UNetArchitecture, ours: UNetArchitecture, where: str) -> None:
    """Where the condition stands beside the time, every block is wider in a net with a condition."""
    if theirs.embedding != ours.embedding:
        was, now = ("a condition", "none") if theirs.condition_width else ("no condition", "one")
        raise UserError(
            f"{where} was trained with {was}, and this run with {now}: every block of its UNet reads "
            f"{theirs.embedding} values of time and condition, and this one's {ours.embedding}; "
            + (
                "set guidance=labels or online"
                if theirs.condition_width
                else "set guidance=none, or take a snapshot of a run with labels or online"
            )
        )
