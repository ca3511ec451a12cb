"""From raw data to a row: what makes each file that a row's config names, in the order in which it is made."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from selfguide.spec.config import Config
from selfguide.spec.published import Row
from selfguide.spec.suggest import check_known

MAKE = "python -m tools.shards make"
ENCODE = "python -m tools.shards encode"
ANNOTATE = "python -m tools.annotate"


@dataclass(frozen=True)
class Step:
    """A command that makes something, and what it reads that another step makes; by hand where it is no command."""

    command: str
    needs: tuple[str, ...] = ()
    by_hand: bool = False

    @property
    def text(self) -> str:
        """As a shell reads it: what is to be done by hand is a comment."""
        return f"# {self.command}" if self.by_hand else self.command


def _only(name: str) -> str:
    return f"--only {name}"


_CIFAR100 = "cifar cifar-100-python.tar.gz"
_IN100 = _only("imagenet100.txt")
DATA = {
    "data/cifar10": f"{MAKE} cifar cifar-10-python.tar.gz",
    "data/cifar10-test": f"{MAKE} cifar cifar-10-python.tar.gz --split test",
    "data/cifar100": f"{MAKE} {_CIFAR100}",
    "data/cifar100-test": f"{MAKE} {_CIFAR100} --split test",
    "data/cifar100-coarse": f"{MAKE} {_CIFAR100} --labels coarse",
    "data/in32": f"{MAKE} downsampled Imagenet32_train",
    "data/in64": f"{MAKE} downsampled Imagenet64_train",
    "data/in32-val-unbalanced": f"{MAKE} downsampled Imagenet32_val --per-class class//20",
    "data/in256": f"{MAKE} folder imagenet/train --size 256",
    "data/in256-val": f"{MAKE} folder imagenet/val --size 256",
    "data/in100-256": f"{MAKE} folder imagenet/train {_IN100} --size 256",
    "data/in100-256-val": f"{MAKE} folder imagenet/val {_IN100} --size 256",
    "data/in100-64": f"{MAKE} folder imagenet/train {_IN100} --size 64",
    "data/in100-64-test": f"{MAKE} folder imagenet/val {_IN100} --size 64",
    "data/churches-256": f"{MAKE} lsun church_outdoor_train_lmdb --size 256",
    "data/tiny-imagenet": f"{MAKE} folder tiny-imagenet-200/train",
    "data/tiny-imagenet-test": f"{MAKE} folder tiny-imagenet-200/val",
    "data/voc-64": f"{MAKE} folder VOC2012/JPEGImages {_only('voc12031.txt')} --size 64",
    "data/coco20k-64": f"{MAKE} folder coco/train2014 {_only('coco20k.txt')} --size 64",
    "data/coco-stuff-64": f"{MAKE} folder coco/train2017 {_only('coco-stuff-train.txt')} --size 64",
    "data/coco-stuff-64-val": f"{MAKE} folder coco/val2017 {_only('coco-stuff-val.txt')} --size 64",
    "data/ffhq-64": f"{MAKE} folder ffhq/images1024x1024 --size 64",
    "data/ffhq-128": f"{MAKE} folder ffhq/images1024x1024 --size 128",
    "data/afhq-64": f"{MAKE} folder afhq/train --size 64",
}
# latents -> images, and what is typed beside
LATENTS = {
    "data/in100-sd": ("data/in100-256", "--encoder sd_vae"),
    "data/in256-sd": ("data/in256", "--encoder sd_vae"),
    "data/churches-sd": ("data/churches-256", "--encoder sd_vae"),
    "data/in100-vavae": ("data/in100-256", "--encoder va_vae --flips"),
    "data/in100-vavae-test": ("data/in100-256-val", "--encoder va_vae"),
    "data/in256-vavae": ("data/in256", "--encoder va_vae --flips"),
    "data/in256-vavae-test": ("data/in256-val", "--encoder va_vae"),
}
# as sidecars name their data -> what is annotated, and what is guided by it where that is another form
ANNOTATED = {
    "cifar10": ("data/cifar10", None),
    "cifar100": ("data/cifar100", None),
    "in32": ("data/in32", None),
    "in64": ("data/in64", None),
    "voc": ("data/voc-64", None),
    "coco20k": ("data/coco20k-64", None),
    "stuff": ("data/coco-stuff-64", None),
    "ffhq": ("data/ffhq-64", None),
    "ffhq128": ("data/ffhq-128", None),
    "afhq": ("data/afhq-64", None),
    "in100": ("data/in100-256", "data/in100-sd"),
    "in256": ("data/in256", "data/in256-sd"),
    "churches": ("data/churches-256", "data/churches-sd"),
}
_VIT = "vit_base_patch16_224"
# the flags of `tools.annotate features` for each network
NETS = {
    "dino": f"--net {_VIT}.dino",
    "mae": f"--net {_VIT}.mae",
    # learned with ImageNet's labels, and its record says so; so is the next
    "vit-b": f"--net {_VIT}.augreg_in1k",
    "resnet50": "--net resnet50.a1_in1k",
    "simclr": "--net resnet50 --weights r50_1x_sk0.pth --method simclr",
    "msn": f"--net {_VIT} --weights vitb16_600ep.pth.tar --method msn",
    "mocov3": f"--net {_VIT} --weights vit-b-300ep.pth.tar --method mocov3",
    "ibot": f"--net {_VIT} --weights ibot_vitb16.pth --method ibot",
    "dinov2": "--net vit_giant_patch14_dinov2.lvd142m",
    # texts stood beside its images
    "clip": "--net vit_gigantic_patch14_clip_224.laion2b --saw-labels no",
}
# made of the data set itself: DINO's weights, adapted to it
_ADAPTED = "adapted"
# both towers of the same net
_CLIP = "clip"
_TOWERS = "--net ViT-bigG-14 --weights open_clip_pytorch_model.bin"
# the data set whose classes' names are others than the images' own, by how many they are
_NAMES = {("cifar100", 20): "data/cifar100-coarse"}
# whose images TEMI's code brought to the network's size; the others' SGDM's did
_CEDM = ("cifar10", "cifar100", "ffhq", "ffhq128", "afhq")
# SGDM fitted it to VOC, and took its authors' own heads for COCO-Stuff
_STEGO = {
    "voc": "--vit vit_small_patch8_224.dino --preset voc",
    "stuff": "--vit vit_base_patch8_224.dino --heads cocostuff27_vit_base_5.ckpt",
}
# the published code fits a part of unit features, and assigns features as they are
_SGDM_KMEANS = "--restarts 1 --per-group 256 --assign-raw"
_TRUTH = {
    "voc": "voc VOC2012",
    "coco20k": "coco coco --split train2014",
    "stuff": "cocostuff27 coco --split train2017",
}
_KINDS = {"labels": "labels", "boxes": "box", "masks": "mask"}
_OF_IMAGES = "notes/images/"
_WEIGHTS = "weights/imagenet256_uvit_large.pth"
_OWN_WEIGHTS = "weights/"


def step(made: str, paper: str = "") -> Step:
    """What makes a data set, sidecar or file of weights that a shipped experiment of a paper names.

    Raises:
        UserError: nothing here makes it.
    """
    if made in DATA:
        return Step(f"{DATA[made]} --out {made}")
    if made in LATENTS:
        images, how = LATENTS[made]
        return Step(f"{ENCODE} {images} {how} --out {made}", (images,))
    if made == _WEIGHTS:
        return Step(
            f"put U-ViT-L/2's weights of ImageNet 256, from github.com/baofff/U-ViT, at {made}",
            by_hand=True,
        )
    if made.startswith(_OWN_WEIGHTS):
        data = made.removeprefix(_OWN_WEIGHTS).partition("-")[0]
        shards = ANNOTATED[data][0]
        return Step(f"{ANNOTATE} adapt {shards} --vit {_VIT}.dino --out {made}", (shards,))
    return _sidecar(made, paper)


def _sidecar(made: str, paper: str) -> Step:
    of_images = made.startswith(_OF_IMAGES)
    data, _, rest = made.removeprefix(_OF_IMAGES).removeprefix("notes/").partition("-")
    check_known("what makes", data, ANNOTATED)
    shards, guided = ANNOTATED[data]
    if rest == "lost":
        options = "--vit vit_small_patch16_224.dino --short 224"
        return Step(f"{ANNOTATE} lost {shards} {options} --out {made}", (shards,))
    if rest == "stego":
        options = _STEGO[data]
        return Step(f"{ANNOTATE} stego {shards} {options} --out {made}", (shards,))
    if rest.startswith("truth-"):
        kind = _KINDS[rest.removeprefix("truth-")]
        # the segments of SBD stand beside VOC's own
        masks = " --masks SegmentationClassAug" if (data, kind) == ("voc", "mask") else ""
        whose = f"{_TRUTH[data]}{masks} --kind {kind}"
        return Step(f"{ANNOTATE} truth {shards} {whose} --out {made}", (shards,))
    clusters = re.fullmatch(r"(.+)-k(\d+)", rest)
    if clusters is None:
        return _features(made, data, rest, shards)
    how, groups = clusters.groups()
    if how == "sgfm":
        assert guided is not None
        options = f"--snapshot RUN --noise-time 0.2 --pooling mean --groups {groups}"
        return Step(
            f"{ANNOTATE} kmeans {guided} {options} --out {made}  # RUN: that of sgfm/{data}_none",
            (guided,),
        )
    if guided is not None and not of_images:
        # found in images, and taken over for their latents
        images = made.replace("notes/", _OF_IMAGES)
        command = f"{ANNOTATE} adopt {guided} --annotation {images} --out {made}"
        return Step(command, (images, guided))
    if how == _CLIP:
        return _by_text(made, data, int(groups), shards)
    return _clusters(made, data, how, int(groups), shards, paper)


def _features(made: str, data: str, net: str, shards: str) -> Step:
    """A network's features, of weights that are adapted first where it is asked for."""
    view = "temi" if data in _CEDM else "sgdm"
    if net == _ADAPTED:
        weights = f"{_OWN_WEIGHTS}{data}-dino.safetensors"
        read = f"--net {_VIT}.dino --weights {weights}"
        command = f"{ANNOTATE} features {shards} {read} --view {view} --out {made}"
        return Step(command, (shards, weights))
    check_known("a network of features", net, NETS)
    options = f"{NETS[net]} --view {view}"
    return Step(f"{ANNOTATE} features {shards} {options} --out {made}", (shards,))


def _by_text(made: str, data: str, groups: int, shards: str) -> Step:
    """CLIP's labels, of the shards' own classes or of others' names."""
    named = _NAMES.get((data, groups))
    names = "" if named is None else f" --names {named}"
    command = f"{ANNOTATE} clip {shards} {_TOWERS}{names} --out {made}"
    return Step(command, (shards, *([named] if named else [])))


def _clusters(made: str, data: str, how: str, groups: int, shards: str, paper: str) -> Step:
    """k-means over a network's features, or TEMI; `adapted`, or a backbone's name, stands before or behind temi."""
    words = how.split("-")
    net = "-".join(word for word in words if word != "temi") or "dino"
    features = f"notes/{data}-{net}"
    verb = "temi" if "temi" in words else "kmeans"
    own = f" {_SGDM_KMEANS}" if (paper, verb) == ("sgdm", "kmeans") else ""
    found = f"{ANNOTATE} {verb} {shards} --features {features} --groups {groups}{own} --out {made}"
    return Step(found, (shards, features))


def named(config: Config) -> Iterator[str]:
    """The data sets, sidecars and weights that a config names and a step makes."""
    yield config.data.root
    if config.init.path:
        yield config.init.path
    yield from config.guidance.folders.values()
    for each in config.scored_by:
        yield from filter(None, (each.evaluation.shards, each.evaluation.test))


def before(config: Config) -> list[Step]:
    """Every step before the run of this config, each once, what is needed first."""
    found: dict[str, Step] = {}
    paper = config.experiment.partition("_")[0]

    def add(made: str) -> None:
        if made not in found:
            one = step(made, paper)
            for needed in one.needs:
                add(needed)
            found[made] = one

    for made in named(config):
        add(made)
    return list(found.values())


def training(row: Row) -> str:
    """The command that trains and scores a row."""
    return " ".join(("python -m launcher.submit", *map(_quoted, row.settings)))


def _quoted(word: str) -> str:
    return f"'{word}'" if re.search(r"[\[\]{} ]", word) else word
