"""Weights that others published, as ours: renamed, and where a convention differs, converted.

`selfguide.spec.official` has the tables of names. What is more than a name:
a learned sigma that our net does not have is cut from the output (patches are laid out pixel by pixel, channels last);
SiT predicts data - noise, so its output changes sign (our v is the derivative by noise-time);
the label table's last row becomes both `null` and `unconditional` where dropped labels are known to have had it;
parts that only ours has ([CLS], prototypes, masks) keep their fresh initialisation, and where guidance wants it so
(SGFM's code) the null row and U-ViT's positions do too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from selfguide.models.backbone import Backbone
from selfguide.spec.config import Config
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.initial_weights import contents_of
from selfguide.spec.official import FORMS, POSITIONS, Contents, check_release, parts_of
from selfguide.spec.uvit import UViTArchitecture
from selfguide.weights import check_finite, copy_token_rows
from shards.errors import UserError

# of tensors
Weights = dict[str, Tensor]
SAME_POSITIONS = 1e-2  # half precision rounds to 4e-3; another order of the halves differs by 1


def adopt(backbone: Backbone, tensors: Mapping[str, Tensor], config: Config) -> Contents:
    """Puts the tensors of an official checkpoint into `backbone` as `config.init` says; says what the file held.

    Raises:
        UserError: a tensor of another size, missing, unknown, or not finite; other positions than DiT's.
    """
    net, where = backbone.net, f"init.path={config.init.path}"
    found = contents_of(config, {name: tuple(t.shape) for name, t in tensors.items()}, net)
    check_finite(tensors, where)
    made = dict(backbone.state_dict())
    for theirs, ours in found.names.items():
        made[ours] = _into(made[ours], _output(theirs, tensors[theirs], found, backbone))
    if config.guidance.takes_tokens or not isinstance(net, UViTArchitecture):
        made |= _positions(backbone, tensors[POSITIONS], found, where)
    if found.rows:
        keep = config.init.labels == "keep"
        null = found.null and config.guidance.takes_tokens
        made |= _label_rows(made, tensors[found.form.table], found.classes, null=null, keep=keep)
    backbone.load_state_dict(made)
    return found


def _output(name: str, tensor: Tensor, found: Contents, backbone: Backbone) -> Tensor:
    """Rows (p p 2C) of the last map cut to (p p C) where sigma is not ours, in our sign."""
    if not name.startswith(f"{found.form.last}."):
        return tensor
    if found.sigma and not backbone.net.learn_sigma:
        by_pixel = tensor.unflatten(0, (-1, 2 * backbone.net.channels))  # (p p, 2C, ...)
        tensor = by_pixel[:, : backbone.net.channels].flatten(0, 1)
    return found.form.sign * tensor


def _into(own: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`; where `own` reads masks beside the image, its channels for them stay."""
    if own.shape == tensor.shape:
        return tensor
    return torch.cat((tensor, own[:, tensor.shape[1] :]), dim=1)


def _positions(backbone: Backbone, given: Tensor, found: Contents, where: str) -> dict[str, Tensor]:
    """U-ViT's learned table by token; DiT's is fixed and only compared."""
    if isinstance(backbone.net, UViTArchitecture):
        extras = (["condition"] if found.rows else []) + ["time"]
        table = backbone.state_dict()["positions"]
        return {"positions": copy_token_rows(table, token_names(backbone.net), given[0], extras)}
    own = backbone.get_buffer("positions").cpu()
    if (own - given[0]).abs().max() > SAME_POSITIONS:
        raise UserError(
            f"{where}: {POSITIONS} is not DiT's fixed sinusoid; these weights learned other positions; take others"
        )
    return {}


@torch.no_grad()
def release(backbone: Backbone, form: str) -> Weights:
    """The weights of `backbone` under the names of an official file: the way back of `adopt`.

    What `adopt` made of such a file comes out bit for bit, but for a learned sigma that was cut off. The table's last
    row is our null row, of a net without labels our unconditional one.

    Raises:
        UserError: such a file has no place for all that this net has.
    """
    net, layout = backbone.net, FORMS[form]
    check_release(net, form)
    assert isinstance(net, DiTArchitecture | UViTArchitecture)
    own, found = backbone.state_dict() | dict(backbone.named_buffers()), Weights()
    for part in parts_of(net, net.learn_sigma):
        sign = layout.sign if part.theirs == layout.last else 1
        for kind in ("weight", "bias") if part.bias else ("weight",):
            found[f"{part.theirs}.{kind}"] = sign * own[f"{part.ours}.{kind}"].detach().cpu()
    tokens = token_names(net) if isinstance(net, UViTArchitecture) else []
    positions = own["positions"].detach().cpu()[None]
    found[POSITIONS] = _sinusoid(net)[None] if isinstance(net, DiTArchitecture) else positions
    if "condition" in tokens:
        # theirs are label, time, patches
        order = [tokens.index("condition"), tokens.index("time")]
        rest = torch.arange(len(tokens), found[POSITIONS].shape[1])
        found[POSITIONS] = found[POSITIONS][:, torch.cat((torch.tensor(order), rest))]
    if isinstance(net, DiTArchitecture) or "condition" in tokens:
        last = own["condition.null" if net.classes else "condition.unconditional"]
        labels = [own["condition.labels.weight"]] if net.classes else []
        found[layout.table] = torch.cat([*labels, last.view(1, -1)]).detach().cpu()
    return {name: tensor.clone() for name, tensor in found.items()}


def _sinusoid(net: DiTArchitecture) -> Tensor:
    """(T, D): DiT's fixed positions in fp64, rounded once as its authors do; ours differ in the last bit."""
    edge, quarter = net.size // net.patch, net.width // 4
    rates = 1 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    turns = torch.arange(edge, dtype=torch.float64)[:, None] * rates
    waves = torch.cat((turns.sin(), turns.cos()), dim=1)  # (edge, D / 2)
    columns, rows = waves.expand(edge, -1, -1), waves[:, None].expand(-1, edge, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1).float()


def token_names(net: UViTArchitecture) -> list[str]:
    """U-ViT's tokens before the patches, in order."""
    return [
        *(["cls"] if net.cls_token else []),
        "time",
        *(["condition"] if net.condition_token else []),
        *(["augment"] if net.augment else []),
    ]


def _label_rows(
    made: Mapping[str, Tensor], table: Tensor, classes: int, *, null: bool, keep: bool
) -> dict[str, Tensor]:
    """The label table's rows here; a U-ViT that is never conditioned has none of them."""
    taken: dict[str, Tensor] = {}
    if null:
        taken |= {"condition.null": table[-1], "condition.unconditional": table[-1]}
    if keep:
        taken["condition.labels.weight"] = table[:classes]
    return {name: rows.clone() for name, rows in taken.items() if name in made}
