"""Counts what makes the host wait for the device: each value read, each result whose shape depends on values, and each
tensor that is made of the host's values on a named device, as the copy is not from page-locked memory.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    torch.ops.aten._local_scalar_dense.default,  # item, bool, float, int, and an if over a tensor
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}  # by a mask
_COPIES = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # no operators on a CPU


class HostReads(TorchDispatchMode):
    """`with HostReads() as reads:` then `reads.total`, and `reads.seen` by what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._functions = _Functions(self.seen)

    @property
    def total(self) -> int:
        return self.seen.total()

    def __enter__(self) -> HostReads:
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in _INDEXING and any(i is not None and i.dtype is torch.bool for i in args[1])
        if func in _READS or masks:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, seen: Counter[str]) -> None:
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func is torch.tensor and (kwargs or {}).get("device") is not None
        if func in _COPIES or made:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))
