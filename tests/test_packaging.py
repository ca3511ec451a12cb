"""What leaves this checkout: the wheel works elsewhere, and every module imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.import_check import failures, modules

ROOT = Path(__file__).parent.parent
DRY = ["experiment=in1k_dit", "nodes=4", "cluster=slurm", "dry_run=true"]


def test_every_module_imports() -> None:
    assert len(modules()) > 60 and not failures()


def test_the_launcher_does_not_import_torch() -> None:
    code = (
        "import sys, launcher.submit, launcher.runs, launcher.logs, launcher.cancel, launcher.watch, "
        "launcher.board.__main__, launcher.attempt, slurm.devcluster, shards.read.stream, tools.shards.__main__\n"
        "assert not {'torch', 'deepspeed', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_constraints_pin_what_pyproject_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["cpu"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    names = {r.split(">")[0].split("<")[0].split("=")[0].strip().lower() for r in asked} - {
        "setuptools"
    }
    assert names <= pinned, names - pinned


@pytest.mark.parametrize("regular", [False, True], ids=["folders", "packages"])
def test_a_working_directory_with_folders_of_our_names_changes_no_command(
    regular: bool, tmp_path: Path
) -> None:
    """A user's own configs/, or shards/ of a data set, is not taken for ours; an installed package is meant."""
    for name in ("configs", "shards", "selfguide", *(() if regular else ("launcher", "tools"))):
        (tmp_path / name).mkdir()
        if regular:
            (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for command in (
        ["launcher.submit", "--help"],
        ["tools.shards", "--help"],
        ["launcher.submit", *DRY],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_a_library_is_imported_from_where_it_is_installed_in_a_data_set_s_own_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "shards").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import shards; print(shards.open)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_the_wheel_answers_a_dry_run_from_the_root_folder() -> None:
    done = subprocess.run(
        ["bash", "tools/wheel_check.sh"], cwd=ROOT, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
