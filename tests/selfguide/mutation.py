"""A mistake that is planted in a function for as long as a test looks whether anybody sees it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest


@contextmanager
def planted(function: Callable[..., Any], edits: Mapping[str, str]) -> Iterator[None]:
    """`function` with texts of its source replaced by others, also for those who imported it before.

    Args:
        function: a plain function or method; of a property its `fget`. Decorators stay as they are.
        edits: each text is in the source exactly once, and becomes another one.

    Raises:
        LookupError: an edit does not apply to the source as it is now.
    """
    real = inspect.unwrap(getattr(function, "__func__", function))
    assert isinstance(real, FunctionType)
    wrong = _compiled(real, edits)
    # a function's code is what every importer runs, under whatever name it has it
    with pytest.MonkeyPatch.context() as patch:
        for part in ("__code__", "__defaults__", "__kwdefaults__"):
            patch.setattr(real, part, getattr(wrong, part))
        yield


def _compiled(real: FunctionType, edits: Mapping[str, str]) -> FunctionType:
    source = textwrap.dedent(inspect.getsource(real))
    for old, new in edits.items():
        if old == new or source.count(old) != 1:
            raise LookupError(
                f"{old!r} is {source.count(old)} times in {real.__qualname__}, and should become {new!r}"
            )
        source = source.replace(old, new)
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    # it inherits the future of annotations from this module, so that none is evaluated
    code = compile(ast.Module([tree], []), f"<planted in {real.__qualname__}>", "exec")
    made: dict[str, Any] = {}
    exec(code, real.__globals__, made)
    return made[real.__name__]
