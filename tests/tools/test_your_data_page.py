"""docs/your-data.md, run as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "your-data.md"


def script(text: str) -> str:
    """The page's blocks as one script for bash; those of Python each in a process of its own."""
    parts = ["set -eu"]
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.S):
        parts.append(block if kind == "bash" else f"python - <<'PYTHON'\n{block}PYTHON\n")
    return "\n".join(parts)


@pytest.mark.parametrize(
    "images",
    [
        # as the page itself says; it starts two runs and takes more than a minute
        pytest.param("640", id="shrunken", marks=pytest.mark.slow),
        pytest.param("12_800", id="as-printed", marks=pytest.mark.slow),
    ],
)
def test_page_of_your_data_run_as_printed_ends_with_a_score(images: str, tmp_path: Path) -> None:
    text = PAGE.read_text()
    assert f"IMAGES={images}" in text
    text = text.replace("export IMAGES=12_800", f"export IMAGES={images}", 1)
    environment = {name: value for name, value in os.environ.items() if "SELFGUIDE" not in name}
    environment["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))
    done = subprocess.run(
        ["bash", "-c", script(text)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    with np.load(tmp_path / "samples" / "all" / "samples.npz") as found:
        assert found["arr_0"].shape == (256, 32, 32, 3)
    assert re.search(r"fd_effnet.*\d", done.stdout)
    attempt = tmp_path / "runs" / "pictures" / "plain" / "attempts" / "0001"
    assert (attempt / "configs" / "0" / "experiment" / "pictures.yaml").is_file()
