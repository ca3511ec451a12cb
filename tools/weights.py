"""`python -m tools.weights export RUN`: a snapshot's weights for the codes of DiT, SiT and U-ViT.

The file has the names and shapes of those that their authors published, and `init=official` reads it again. A .pt is
what their `torch.load` takes; a .safetensors holds the same tensors.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from selfguide.spec.official import FORMS
from shards import cli, storage
from shards.errors import UserError
from tools import flags

EPILOG = """examples:
  python -m tools.weights export RUN --form dit --out dit.pt
  python -m tools.weights export RUN --form uvit --images 512000 --out uvit.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.command("tools.weights", __doc__, epilog=EPILOG)
    flags.add(
        parser,
        ("verb", ("export",), None, "write the file"),
        ("run RUN", str, None, flags.RUN),
        ("--form", tuple(FORMS), flags.REQUIRED, "whose names and shapes the file has"),
        ("--out FILE", flags.here, flags.REQUIRED, "a new .pt or .safetensors"),
        ("--images N", int, None, "the snapshot at N images seen (default: the newest)"),
        ("--ema I", int, 0, "index of the average, from 0 (0)"),
        flags.RUNS,
        flags.JSON,
    )
    return export(parser.parse_args(argv))


def export(options: argparse.Namespace) -> int:
    """Writes the file; returns the exit code."""
    out = Path(options.out)
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--out {out}: name a .pt or .safetensors")
    if out.exists():
        raise UserError(f"--out {out}: there is such a file already; name another")
    # torch takes seconds to import: not for help or a mistake
    import torch
    from safetensors.torch import save_file

    from selfguide.networks.official import release
    from tools.sample_run import load_snapshot

    snapshot, folder = load_snapshot(options.run, options.runs, options.images, options.ema)
    try:
        weights = release(snapshot.student.backbone, options.form)
    except UserError as error:
        place = shlex.quote(str(folder))
        raise UserError(
            f"{error}; as they are, `python -m tools.sample {place}` reads them, and init=snapshot init.path={place} "
            "begins a run with them"
        ) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".pt":
        torch.save(weights, out)
    else:
        save_file(weights, out)
    said = {"out": str(out), "sha256": storage.sha256(str(out)), "tensors": len(weights)}
    said |= {"saw_labels": snapshot.saw_labels, "images": snapshot.images}
    print(json.dumps(said) if options.json else f"{len(weights)} tensors in {out}")
    return 0


if __name__ == "__main__":
    cli.run(main)
