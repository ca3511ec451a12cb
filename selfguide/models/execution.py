"""How a backbone is run in training: compiled block by block, activations recomputed, images stored channels last.

None of it changes what is computed, nor the names and shapes of the weights, so snapshots and checkpoints know
nothing of it. Sampling and evaluation run the plain net: they build it from a snapshot and come with other batches.
"""

from __future__ import annotations

import torch

from selfguide.models.backbone import Backbone
from selfguide.spec.config import EngineConfig
from selfguide.spec.rank_status import RankStatus
from shards.errors import UserError


def configure_execution(backbone: Backbone, engine: EngineConfig, device: torch.device) -> None:
    """Makes `backbone` run as `engine` asks, in place; before an engine takes it over.

    A deep copy keeps recomputation and layout and is not compiled: configure it again.

    Raises:
        UserError: engine.compile where nothing can be compiled for `device`.
    """
    backbone.recompute = engine.recompute
    backbone.channels_last = engine.channels_last
    if engine.compile:
        _require_compiler(device)
        _compile(backbone, device)


def tell_of_compiling(status: RankStatus) -> None:
    """Has `status` say when this process compiles: a step that does may take minutes."""
    # seconds to import
    from torch._dynamo.callback import on_compile_end, on_compile_start

    on_compile_start(lambda _: status.compiles(True))
    on_compile_end(lambda _: status.compiles(False))


def _compile(backbone: Backbone, device: torch.device) -> None:
    """Every block by itself: equal blocks share one graph, where the whole net would be one large one to compile.

    Graphs are made for one batch size, that of the run. A block that cannot be one graph is an error, or part of it
    would go on slowly and in silence.
    """
    blocks = list(backbone.repeated())
    # torch counts the graphs of all blocks together and goes back to eager after eight: a UNet has more kinds of
    # blocks than that, each with a graph for training and one for features
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * len(blocks))
    # on CPUs the compiler lays convolutions out channels last unasked: a sixth slower, and engine.channels_last decides
    options = {"layout_optimization": False} if device.type == "cpu" else None
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, options=options)


def _require_compiler(device: torch.device) -> None:
    """Compiles one addition: a missing compiler is found now, not behind the first batch."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except RuntimeError as error:
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        cause = " ".join(
            str(error).strip().split("\n\n")[0].split()
        )  # advice on debugging torch follows
        raise UserError(
            f"engine.compile=true needs {needed} on every node, and torch could compile nothing for "
            f"{device.type} ({cause}); install g++ or name one in CXX, or set engine.compile=false"
        ) from error
