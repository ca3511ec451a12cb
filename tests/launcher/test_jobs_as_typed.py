"""What a job is given of the command line: its variables, folders, comment, nodes and times, as they were typed."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import backends, jobs
from launcher.backends import local, slurm_queue, submitit_names
from launcher.backends.protocol import Job
from launcher.backends.slurm_queue import Queued
from launcher.compose import Frames, compose
from launcher.folder import Attempt
from launcher.submission import absolute, where
from selfguide.spec.config import Config
from selfguide.spec.config.laws import Minutes
from selfguide.spec.validate import validate
from shards.errors import UserError

FRAMES: Frames = {}


def config(*settings: str) -> Config:
    return compose(["experiment=digits_uncond", "cluster=slurm", *settings], FRAMES)


def lines(made: Config) -> list[str]:
    """The batch script of its first training job."""
    at = Attempt(Path(made.runs) / made.experiment / "RUN" / "attempts" / "0001")
    text = backends.of(made.cluster).script(jobs.training(made, at, "RUN"))
    assert text is not None
    return text.splitlines()


@pytest.mark.parametrize(
    "text", ["9.10", "a,b", 'it\'s $HOME `x` "y"', "ünï 図", "${HOME}", "a\nb", "#=(~%", "\\n"]
)
def test_variables_reach_a_job_as_typed(text: str) -> None:
    made = replace(config().cluster, environment={"X": text})
    script = "\n".join(lines(replace(config(), cluster=made)))
    setup = script[script.index("export X=") : script.index("\nexport PYTHONPATH")]
    done = subprocess.run(
        ["bash", "-c", f'{setup}\nprintf "%s" "$X"'], capture_output=True, check=True
    )
    assert done.stdout.decode() == text


@pytest.mark.parametrize("own", ["/opt/mine", "/opt/my own", "/a:/b", "$HOME/x", "/ünï,c", ""])
@pytest.mark.parametrize("inherited", ["/last", ""])
def test_own_pythonpath_comes_between_code_and_what_is_inherited(
    own: str, inherited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = lines(config(f"cluster.environment.PYTHONPATH={own}"))
    (line,) = (line for line in script if line.startswith("export PYTHONPATH="))
    done = subprocess.run(
        ["bash", "-c", f'PYTHONPATH={inherited}; {line}; printf "%s" "$PYTHONPATH"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # an empty part would be the folder where the job starts
    behind = [each for each in (own, inherited) if each]
    assert done.stdout.endswith(":".join(["/attempts/0001/code", *behind]))
    monkeypatch.setenv("PYTHONPATH", inherited)
    assert local._environment(_job(PYTHONPATH=own))["PYTHONPATH"] == ":".join(["/code", *behind])


@pytest.mark.parametrize(
    "typed",
    [
        "runs=~/x",
        "data.root=~/x",
        "data.cache=~/x",
        "init.path=~/x",
        "evaluation.reference=~/x",
        "evaluation.shards=~/x",
    ],
)
def test_home_is_meant_by_a_tilde_in_a_setting(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell expands it behind a name with a dot."""
    monkeypatch.setenv("HOME", str(tmp_path))
    made: Any = absolute(config(typed))
    for part in typed.partition("=")[0].split("."):
        made = getattr(made, part)
    assert made == f"{tmp_path}/x"


def _job(**environment: str) -> Job:
    return Job(
        function=print, argument="", folder=Path("/job"), code=Path("/code"), name="n", comment="c",
        timeout_min=1, environment=environment,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["A-B", "1A", "A B", "", "É"])
def test_names_that_no_variable_has_are_refused(name: str) -> None:
    made = replace(config().cluster, environment={name: "x"})
    with pytest.raises(UserError, match="no name of a variable"):
        validate(replace(config(), cluster=made))


@pytest.mark.parametrize("folder", ["100%jx", "%t%A%a", "50%", "%%", "a b%j'c"])
def test_percent_in_a_folder_is_no_pattern(folder: str, tmp_path: Path) -> None:
    root = tmp_path / folder
    script = lines(replace(config(), runs=str(root)))
    (output,) = (shlex.split(line[8:])[0] for line in script if "--output=" in line)
    (command,) = (shlex.split(line) for line in script if line.startswith("srun "))
    asked = [output.partition("=")[2], command[command.index("--output") + 1]]
    for each, name in zip(asked, ("%j_0_log.out", "%j_%t_log.out"), strict=True):
        # as Slurm reads it
        assert Path(each.replace("%%", "%")).parent == Path(command[-1])
        assert each.endswith(f"/{name}") and each.count("%%") == str(root).count("%")
    assert command[-1].startswith(f"{root}/") and command[-2] == "launcher.backends.submitit_names"


def test_files_of_submitit_lie_in_a_folder_with_percent(tmp_path: Path) -> None:
    from submitit.core.utils import JobPaths

    submitit_names.install()
    submitit_names.install()
    paths = JobPaths(tmp_path / "%j%a" / "job", job_id="12", task_id=3)
    assert paths.folder == tmp_path / "%j%a" / "job"
    assert paths.stdout == paths.folder / "12_3_log.out"
    assert paths.submitted_pickle == paths.folder / "12_submitted.pkl"
    assert "submitit.core._submit" in submitit_names.command("python", tmp_path)


def test_own_comment_stands_before_the_run_and_jobs_are_found_by_it() -> None:
    script = lines(config("cluster.comment=project 7", "runs=/runs"))
    assert "#SBATCH --comment='project 7 /runs/digits_uncond/RUN'" in script
    record: Any = {"id": "1", "comment": "/runs/e/RUN"}
    for comment, state in [
        ("project 7 /runs/e/RUN", "running"), ("/runs/e/RUN", "running"), ("/other/runs/e/RUN", "gone"),
        ("project 7", "gone"), ("", "gone"),
    ]:  # fmt: skip
        queue = {"1": Queued(state="RUNNING", name="n", comment=comment)}
        assert slurm_queue.state(record, queue) == state
    with pytest.raises(UserError, match=r"cluster\.comment"):
        validate(config("cluster.comment=a|b"))


def test_nodes_are_asked_for_by_name_for_training_alone() -> None:
    made = config("cluster.nodelist=n[1-2],n7", "nodes=2", "train.batch=1024")
    assert "#SBATCH --nodelist='n[1-2],n7'" in lines(made)
    at = Attempt(Path("/runs/e/RUN/attempts/0001"))
    small = backends.of(made.cluster).script(
        jobs.evaluation(made, at, "RUN", at.run.evals / "request.json")
    )
    assert small is not None and "nodelist" not in small
    with pytest.raises(UserError, match=r"min_nodes=1 with cluster\.nodelist"):
        validate(replace(made, min_nodes=1))


@pytest.mark.parametrize(
    ("typed", "minutes"),
    [
        ("90", 90), ("1-00:00:00", 1440), ("2-12", 3600), ("1-02:30", 1590), ("24:00:00", 1440),
        ("00:30:00", 30), ("90:00", 90), ("00:00:30", 1), ("0:90", 2),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_writes_them(typed: str, minutes: int, tmp_path: Path) -> None:
    made = config(f"cluster.timeout_min={typed}", f"cluster.evaluation_timeout_min={typed}")
    assert made.cluster.timeout_min == made.cluster.evaluation_timeout_min == minutes
    site = tmp_path / "times.yaml"
    site.write_text(f"kind: slurm\ntimeout_min: {typed}\n")
    assert compose(["experiment=digits_uncond", f"cluster={site}"]).cluster.timeout_min == minutes


@pytest.mark.parametrize("typed", ["1-", "-1:00", "a", "1:2:3:4", "1d"])
def test_what_is_no_time_is_refused(typed: str) -> None:
    assert Minutes().read(typed) == typed
    with pytest.raises(UserError, match="no length of time"):
        config(f"cluster.timeout_min='{typed}'")


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("partition=gpu,big", "--partition=gpu,big"),
        ("partition=[a,b]", "--partition='[a,b]'"),
        ("account=9.10", "--account=9.10"),
        ("qos=1e3", "--qos=1e3"),
        ("constraint=a100&ib|h100*2", "--constraint='a100&ib|h100*2'"),
        ("reservation=null_1", "--reservation=null_1"),
        ("nodelist=n[01-04,7]", "--nodelist='n[01-04,7]'"),
        ("exclude=n[1,3]", "--exclude='n[1,3]'"),
        ("exclusive=true", "--exclusive"),
        ("gres=gpu:h100:2", "--gres=gpu:h100:2"),
        ("timeout_min=1-00:00:00", "--time=1440"),
    ],
)
def test_fields_of_a_cluster_stand_in_the_script_as_typed(typed: str, line: str) -> None:
    made = config(f"cluster.{typed}", "cluster.gpus_per_node=2")
    validate(made)
    assert f"#SBATCH {line}" in lines(made)


@pytest.mark.parametrize("option", ["x", "9.10", "1e3", "true", "a=b,c"])
def test_free_options_of_sbatch_are_text(option: str) -> None:
    script = lines(config(f"cluster.sbatch={{wckey: '{option}', mail-type: FAIL}}"))
    wanted = "--wckey" if option == "true" else f"--wckey={option}"
    assert f"#SBATCH {wanted}" in script and "#SBATCH --mail-type=FAIL" in script


@pytest.mark.parametrize(
    ("visible", "count"), [("-1", 0), ("", 0), ("0,-1,2", 1), ("NoDevFiles", 0), ("0, 1", 2), ("GPU-a", 1)]
)  # fmt: skip
def test_gpus_are_counted_as_cuda_counts_them(
    visible: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(local.gpus()) == count
    assert bool(local.Local().notes(8)) == bool(count)


@pytest.mark.parametrize(
    "name",
    [
        "SQUEUE_STATES",
        "SQUEUE_USERS",
        "SCANCEL_STATE",
        "SINFO_ALL",
        "SBATCH_PARTITION",
        "SACCT_FORMAT",
    ],
)
def test_ping_is_sent_without_variables_that_steer_slurm(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.backends import slurm_client

    asked: dict[str, Any] = {}
    monkeypatch.setattr(slurm_client.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(
        slurm_client.subprocess,
        "run",
        lambda *args, **how: (
            asked.update(how) or subprocess.CompletedProcess(args, 0, "ctld is UP", "")
        ),
    )
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CLUSTERS", "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    assert slurm_client.answers()
    steering = {
        each for each in asked["env"] if each.startswith(("SLURM", "SQ", "SC", "SI", "SB", "SA"))
    }
    assert steering == {"SLURM_CONF"} and asked["env"]["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize("runs", ["my runs", "$HOME", "it's", "a;b", "(x)"])
def test_printed_commands_are_words_of_a_shell(runs: str) -> None:
    assert shlex.split(where(replace(config(), runs=runs))) == ["--runs", runs]


@pytest.mark.parametrize("seed", ["-1", str(2**64), "1e30", "1.5", "x"])
def test_seeds_that_no_generator_takes_are_refused(seed: str) -> None:
    with pytest.raises(UserError, match=r"^seed="):
        validate(config(f"seed={seed}"))
    with pytest.raises(UserError, match=r"evaluation\.seed="):
        validate(config(f"evaluation.seed={seed}"))
    validate(config(f"seed={2**64 - 1}"))


def test_submitit_hands_in_the_script_that_is_shown(tmp_path: Path) -> None:
    from submitit.slurm.slurm import SlurmExecutor

    submitit_names.install()
    folder = tmp_path / "%j" / "job"
    executor = SlurmExecutor(folder)
    parameters = {"job_name": "n", "nodes": 2, "stderr_to_stdout": True}
    executor.update_parameters(**parameters)
    command = submitit_names.command("python", folder)
    made = executor._make_submission_file_text(command, "uid")
    assert "%%j/job/%j_0_log.out" in made
    assert made == submitit_names.script(command, folder, **executor.parameters)
