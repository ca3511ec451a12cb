"""The dry run: offline, fast, without torch, and it shows the very script that would be queued."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import REPOSITORY

from launcher import describe, submit
from launcher.compose import compose
from selfguide.spec.sizes import footprint
from selfguide.spec.weight_files import FOLDER, INCEPTION
from shards.errors import UserError

IN1K = ["experiment=in1k_dit", "nodes=4", "cluster=slurm"]


def command(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m launcher.submit` in a folder of its own, with no Slurm in reach."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": "/usr/bin:/bin",
        **variables,
    }
    return subprocess.run(
        [sys.executable, "-m", "launcher.submit", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_it_answers_quickly_offline_and_writes_nothing(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(tmp_path, *IN1K, "dry_run=true", PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time, which neighbours do not lengthen: 0.4 s, and importing torch alone takes 2
    assert after.ru_utime - before.ru_utime < 2.0
    for part in (
        "#SBATCH --nodes=4",
        "32 = 4 nodes x 8",
        "not checked",
        "without activations",
        "learning_rate",
    ):
        assert part in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    heavy = ("torch", "numpy", "scipy", "sklearn", "s3fs", "rich", "matplotlib")
    program = (
        "import sys; from launcher import submit\n"
        f"submit.main({[*IN1K, 'dry_run=true']!r})\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == "[]"


def test_json_tells_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert submit.main([*IN1K, "dry_run=true", "--json", f"runs={tmp_path}"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ranks"]["world"] == 32 and told["batch"] == {
        "global": 1024,
        "micro": 32,
        "accumulation": 1,
        "steps": 400_000,
    }
    size = footprint(compose(IN1K))
    assert (
        told["bytes_per_rank"]["total"] == size.rank and told["checkpoint_bytes"] == size.checkpoint
    )
    assert told["data"] == {"root": "s3://selfguide/in1k-sdvae-f8", "checked": False}
    assert told["config"]["train"]["images"] == 409_600_000
    # DiT-XL/2 is published as 118.6 GFLOP (multiply-adds) a forward; the [CLS] token adds its share
    assert told["gflop"]["forward_image"] == pytest.approx(2 * 118.6, rel=0.01)


def test_what_its_scores_wait_for_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def waits_for() -> list[str]:
        assert submit.main([*IN1K, "dry_run=true", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["evaluation"]
        assert told["protocol"] == "fid_adm"
        return told["waits_for"]

    (weights,) = (each for each in waits_for() if INCEPTION.files[0] in each)
    assert INCEPTION.fetch in weights
    (tmp_path / INCEPTION.files[0]).touch()
    assert not any(INCEPTION.files[0] in each for each in waits_for())


def test_the_script_is_the_golden_one(tmp_path: Path) -> None:
    script = describe.facts(compose([*IN1K, f"runs={tmp_path}"]))["sbatch"]
    golden = (Path(__file__).parent / "golden_in1k_dit.sh").read_text()
    assert script == golden.replace("{runs}", str(tmp_path)).replace("{python}", sys.executable)


def test_site_facts_reach_the_script(tmp_path: Path) -> None:
    site = [
        "cluster.partition=gpu",
        "cluster.account=a b",
        "cluster.qos=high",
        "cluster.mem_gb=64",
        "cluster.request_gpus=false",
        "cluster.environment.NCCL_DEBUG='a $b'",
        "train.micro_batch=8",
    ]
    told = describe.facts(compose([*IN1K, *site, f"runs={tmp_path}"]))
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account='a b'",
        "#SBATCH --qos=high",
        "#SBATCH --mem=65536MB",
        "export NCCL_DEBUG='a $b'",
    ):
        assert line in told["sbatch"].splitlines()
    assert "gpus" not in told["sbatch"]
    assert told["batch"]["accumulation"] == 4


def test_submitit_still_has_the_generator_we_call() -> None:
    """It is private to Submitit: an update that moves it must fail here and not at a user's."""
    from submitit.slurm import slurm

    assert "wckey" in slurm._get_default_parameters() and callable(slurm._make_sbatch_string)


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("experiment=imagenet", ["imagenet", "in1k_dit"]),
        ("experiment=digits_dit cluster=local tran.batch=1", ["tran.batch", "train.batch"]),
        ("experiment=digits_dit cluster=local nodes=0", ["nodes=0", "1 or more"]),
        ("experiment=digits_dit cluster=local nodes=2", ["nodes=2", "cluster=slurm", "nodes=1"]),
        ("experiment=digits_dit cluster=local train.batch=127", ["train.batch=127", "126 or 128"]),
        ("experiment=digits_dit cluster=local", ["data/digits", "tools.shards make"]),
        ("experiment=digits_dit cluster=local data.root=empty", ["empty", "tools.shards make"]),
        ("experiment=digits_dit cluster=local --jsn", ["--jsn", "--json"]),
    ],
)
def test_a_mistake_exits_2_with_one_line_and_leaves_nothing(
    tmp_path: Path, typed: str, parts: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    done = command(tmp_path, *typed.split())
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_auto_is_this_machine_where_no_slurm_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = submit.resolve(["experiment=digits_dit", "cluster=auto", "cluster.timeout_min=7"])
    assert (config.cluster.kind, config.cluster.timeout_min, config.ranks) == ("local", 7, 2)


def test_auto_is_slurm_where_one_answers_and_waits_two_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Slurmctld(primary) at n1 is UP'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    config = submit.resolve(["experiment=in1k_dit"])
    assert (config.cluster.kind, config.ranks) == ("slurm", 8)
    scontrol.write_text("#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    assert submit.resolve(["experiment=in1k_dit"]).cluster.kind == "local"
    assert 2 <= time.monotonic() - began < 55, "it did not wait for an answer that takes a minute"


def test_slurm_without_sbatch_is_said_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], runs: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="login node"):
        submit.main([*settings, "cluster=slurm", "cluster.gpus_per_node=2"])
    assert not runs.exists()
