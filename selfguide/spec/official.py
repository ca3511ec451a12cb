"""Checkpoints that others published: their names, their shapes, and what each tensor is called here. Torch-free.

DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024) share their names:
  x_embedder.proj                      patchify
  t_embedder.mlp.0, .2                 time.hidden, time.out
  y_embedder.embedding_table           condition.labels; a row for dropped labels behind them, where it has one, is
                                       condition.null and condition.unconditional
  pos_embed                            nothing: it is fixed, and must equal ours
  blocks.i.attn.qkv, .attn.proj        blocks.i.attention.qkv, .attention.project
  blocks.i.mlp.fc1, .fc2               blocks.i.mlp.up, .mlp.down
  blocks.i.adaLN_modulation.1          blocks.i.modulation
  final_layer.adaLN_modulation.1       final_modulation
  final_layer.linear                   final
U-ViT (Bao et al. 2023):
  patch_embed.proj                     patchify
  label_emb                            condition.labels, and a last row as above
  pos_embed ([label,] time, patches)   positions ([CLS,] time, [condition,] patches)
  in_blocks.i, mid_block               blocks.i, blocks.half
  out_blocks.i, .skip_linear           blocks.(half + 1 + i).block, .skip
    norm1, norm2, attn.qkv (no bias)     norm1, norm2, attention.qkv
    attn.proj, mlp.fc1, mlp.fc2          attention.project, mlp.up, mlp.down
  norm, decoder_pred, final_layer      final_norm, final, smooth
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from selfguide.spec.architecture import Architecture, TimeInput
from selfguide.spec.config import Prediction
from selfguide.spec.dit import TIME_FREQUENCIES, DiTArchitecture
from selfguide.spec.uvit import UViTArchitecture
from shards.errors import UserError

Shape = tuple[int, ...]


class Part(NamedTuple):
    """A weight, and a bias as long as its first side: their name, ours, the weight's shape."""

    theirs: str
    ours: str
    shape: Shape
    bias: bool = True


class Training(NamedTuple):
    """What a net learned: how it was fed time, on which path, and what it predicts there."""

    time: TimeInput
    path: str
    prediction: Prediction
    betas: str = "linear"  # of path ddpm
    sigma_data: float = 0.5  # of prediction edm

    def __str__(self) -> str:
        betas = f" path.betas={self.betas}" if self.path == "ddpm" else ""
        scale = f" path.sigma_data={self.sigma_data}" if self.prediction == "edm" else ""
        return f"path.name={self.path}{betas} path.prediction={self.prediction}{scale}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """What distinguishes one publisher's files from another's."""

    title: str
    family: type[Architecture]
    switches: Mapping[str, Any]  # the only values of these fields that its nets have
    trained: tuple[Training, ...]  # as its nets were, the usual first
    table: str  # of labels
    last: str  # the map to output patches
    sign: int = 1  # of the output


POSITIONS = "pos_embed"
_DIT: dict[str, Any] = {
    "family": DiTArchitecture,
    "switches": {"norm": "layer", "mlp": "gelu", "rope": False, "qk_norm": False},
    "table": "y_embedder.embedding_table.weight",
    "last": "final_layer.linear",
}
FORMS: dict[str, Form] = {
    "dit": Form(title="DiT", trained=(Training("index", "ddpm", "eps"),), **_DIT),
    # predicts data - noise, the derivative by its data-time; ours is by noise-time
    "sit": Form(title="SiT", trained=(Training("data", "rectified_flow", "v"),), sign=-1, **_DIT),
    "uvit": Form(
        title="U-ViT",
        family=UViTArchitecture,
        switches={"learn_sigma": False},
        trained=(  # the continuous VP nets, and those on 1000 betas
            Training("noise_999", "vp", "eps"),
            Training("noise_1000", "ddpm", "eps", betas="scaled_linear"),
        ),
        table="label_emb.weight",
        last="decoder_pred",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint that fits holds besides its weights."""

    form: Form
    sigma: bool  # its output has the channels of a learned sigma behind those of the prediction
    rows: int  # of the label table; 0 without a table
    null: bool  # whether the last of them is known to be what dropped labels got
    names: Mapping[str, str]  # theirs -> ours, all but the label table and the positions

    @property
    def saw_labels(self) -> bool:
        return self.rows > 1

    @property
    def classes(self) -> int:
        return self.rows - self.null


def has_null(rows: int, classes: tuple[int, ...]) -> bool:
    """Whether a table of so many rows ends with one for dropped labels; `classes` it may be of, the likeliest first.

    Nets that were trained without dropping labels (U-ViT's ImageNet 64) have none, and nothing in the file says so.
    """
    if rows == 1:
        return True  # all that this net was ever conditioned on
    return next((rows == count + 1 for count in classes if rows in (count, count + 1)), False)


def contents(
    found: Mapping[str, Shape], name: str, net: Architecture, where: str, classes: tuple[int, ...]
) -> Contents:
    """What a file of form `name` holds for `net`, from the shapes found in it under their names.

    `classes` are those that it may have been trained with, the likeliest first.

    Raises:
        UserError: a shape of another size, a tensor that is missing, or one that nothing of ours stands for.
    """
    form = FORMS[name]
    assert isinstance(
        net, DiTArchitecture | UViTArchitecture
    )  # `selfguide.spec.initial_weights` checked it
    table = found.get(form.table, (0, net.width))
    if len(table) != 2:
        raise UserError(
            f"{where} has {form.table} of shape {table}, and a table of labels is (rows, {net.width}); take other "
            "weights"
        )
    rows = table[0]
    width = net.patch**2 * net.channels
    output = found.get(f"{form.last}.weight")
    sigma = form.family is DiTArchitecture and output == (2 * width, net.width)
    if net.learn_sigma and output == (width, net.width):
        raise UserError(
            f"{where} predicts no sigma and model.learn_sigma=true; set model.learn_sigma=false"
        )
    parts = parts_of(net, sigma)
    shapes = {f"{part.theirs}.weight": part.shape for part in parts}
    shapes |= {f"{part.theirs}.bias": part.shape[:1] for part in parts if part.bias}
    extras = 0 if form.family is DiTArchitecture else 1 + (rows > 0)
    shapes[POSITIONS] = (1, extras + net.tokens, net.width)
    if rows or form.family is DiTArchitecture:
        shapes[form.table] = (rows, net.width)
    _same(found, shapes, form.title, where)
    ours = {part.theirs: part.ours for part in parts}
    names = {
        theirs: f"{ours[stem]}.{kind}"
        for theirs in shapes
        for stem, _, kind in [theirs.rpartition(".")]
        if stem in ours
    }
    return Contents(form=form, sigma=sigma, rows=rows, null=has_null(rows, classes), names=names)


def _same(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], title: str, where: str
) -> None:
    cure = "choose the model it was trained as (model=..., or its model.* numbers), or another init.form"
    for name, shape in expected.items():
        if found.get(name, shape) != shape:
            raise UserError(
                f"{where} is of another size: {name} is {found.get(name)} there, and this model takes {shape}; {cure}"
            )
    missing = [name for name in expected if name not in found]
    if missing:
        raise UserError(
            f"{where} is no {title} of this model's form or depth: it lacks {_several(missing)}; {cure}"
        )
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise UserError(
            f"{where} holds {_several(unknown)}, for which a {title} of this model's form and depth has no "
            f"place; {cure}"
        )


def _several(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def parts_of(net: DiTArchitecture | UViTArchitecture, sigma: bool) -> list[Part]:
    """All but the label table and the positions; `sigma`: the output has the channels of a learned sigma."""
    return _dit(net, sigma) if isinstance(net, DiTArchitecture) else _uvit(net)


# parts that no official file has: their value in nets without, and what they are for
_CONDITIONED: Mapping[str, tuple[Any, str]] = {
    "cls_token": (False, "a [CLS] token that guidance reads"),
    "dense": (
        0,
        "a vector that it is conditioned on, such as the prototype of a group found online",
    ),
    "spatial": (0, "boxes or masks that it is conditioned on"),
    "dense_patch": (0, "a vector for each patch that it is conditioned on"),
    "augment": (0, "labels that say how an image was augmented"),
    "self_condition": (None, "the layer that conditions later ones"),
}


def check_release(net: Architecture, form: str) -> None:
    """Returns where an official file of this form can hold all that this net has.

    Raises:
        UserError: another family, or parts that such a file has no place for.
    """
    layout = FORMS[form]
    if not isinstance(net, layout.family):
        fit = [name for name, other in FORMS.items() if isinstance(net, other.family)]
        cure = f"take {' or '.join(f'--form {name}' for name in fit)}" if fit else "no form has one"
        raise UserError(
            f"--form {form}: a {layout.title} file holds no {type(net).__name__.removesuffix('Architecture')}; {cure}"
        )
    more = {field: value for field, (value, _) in _CONDITIONED.items()}
    for field, value in (more | dict(layout.switches)).items():
        if getattr(net, field, value) != value:
            _, what = _CONDITIONED.get(field, (value, ""))
            raise UserError(
                f"--form {form}: this model has {field}={getattr(net, field)}{what and f', {what}'}, for which "
                f"{layout.title}'s files have no place; only models with {field}={value} fit"
            )


def _dit(net: DiTArchitecture, sigma: bool) -> list[Part]:
    d, p = net.width, net.patch
    return [
        Part("x_embedder.proj", "patchify", (d, net.channels, p, p)),
        Part("t_embedder.mlp.0", "time.hidden", (d, TIME_FREQUENCIES)),
        Part("t_embedder.mlp.2", "time.out", (d, d)),
        *(part for i in range(net.depth) for part in _dit_block(f"blocks.{i}", d)),
        Part("final_layer.adaLN_modulation.1", "final_modulation", (2 * d, d)),
        Part("final_layer.linear", "final", (p * p * net.channels * (1 + sigma), d)),
    ]


def _dit_block(name: str, d: int) -> list[Part]:
    return [
        Part(f"{name}.attn.qkv", f"{name}.attention.qkv", (3 * d, d)),
        Part(f"{name}.attn.proj", f"{name}.attention.project", (d, d)),
        Part(f"{name}.mlp.fc1", f"{name}.mlp.up", (4 * d, d)),
        Part(f"{name}.mlp.fc2", f"{name}.mlp.down", (d, 4 * d)),
        Part(f"{name}.adaLN_modulation.1", f"{name}.modulation", (6 * d, d)),
    ]


def _uvit(net: UViTArchitecture) -> list[Part]:
    d, p, c, half = net.width, net.patch, net.channels, net.depth // 2
    parts = [Part("patch_embed.proj", "patchify", (d, c, p, p))]
    for i in range(half):
        parts += _uvit_block(f"in_blocks.{i}", f"blocks.{i}", d)
    parts += _uvit_block("mid_block", f"blocks.{half}", d)
    for i in range(half):
        theirs, ours = f"out_blocks.{i}", f"blocks.{half + 1 + i}"
        parts.append(Part(f"{theirs}.skip_linear", f"{ours}.skip", (d, 2 * d)))
        parts += _uvit_block(theirs, f"{ours}.block", d)
    ends = [
        Part("norm", "final_norm", (d,)),
        Part("decoder_pred", "final", (p * p * c, d)),
        Part("final_layer", "smooth", (c, c, 3, 3)),
    ]
    return parts + (ends if net.conv else ends[:-1])


def _uvit_block(theirs: str, ours: str, d: int) -> list[Part]:
    return [
        Part(f"{theirs}.norm1", f"{ours}.norm1", (d,)),
        Part(f"{theirs}.attn.qkv", f"{ours}.attention.qkv", (3 * d, d), bias=False),
        Part(f"{theirs}.attn.proj", f"{ours}.attention.project", (d, d)),
        Part(f"{theirs}.norm2", f"{ours}.norm2", (d,)),
        Part(f"{theirs}.mlp.fc1", f"{ours}.mlp.up", (4 * d, d)),
        Part(f"{theirs}.mlp.fc2", f"{ours}.mlp.down", (d, 4 * d)),
    ]
