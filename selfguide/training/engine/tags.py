"""What each parameter is: decay and optimisers tell parameters apart by this tag, and not by their names or shapes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

# matrix   a map of vectors: the weight of a linear layer
# kernel   a convolution's weight
# bias     whatever is added
# norm     the scale of a normalisation
# embedding  a row for each class, position or prototype
# token    a learned vector in the place of an input: [CLS], null, unconditional
Tag = Literal["matrix", "kernel", "bias", "norm", "embedding", "token"]

# parameters of modules that are neither layers of torch nor norms, by the last part of their names
_TOKENS = frozenset({"cls", "null", "unconditional"})
_EMBEDDINGS = frozenset({"positions", "prototypes", "rows"})


def tags_of(module: nn.Module) -> dict[str, Tag]:
    """The tag of every parameter of `module`, by its name."""
    return {
        f"{prefix}.{name}" if prefix else name: _tag(owner, name, parameter)
        for prefix, owner in module.named_modules()
        for name, parameter in owner.named_parameters(recurse=False)
    }


def _tag(owner: nn.Module, name: str, parameter: Tensor) -> Tag:
    if name in _TOKENS:
        return "token"
    if name in _EMBEDDINGS or isinstance(owner, nn.Embedding):
        return "embedding"
    if name == "bias":
        return "bias"
    if parameter.ndim > 2:
        return "kernel"
    # of vectors only the scales of norms are left
    return "matrix" if parameter.ndim == 2 else "norm"
