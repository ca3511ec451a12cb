"""Profiles of sites: what of them reaches which job, files outside of the package, and what is refused."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
from waiting import REPOSITORY

from launcher import backends, jobs, submit, watch
from launcher.choices import options
from launcher.compose import compose, compose_cluster
from launcher.folder import Attempt
from selfguide.spec.config import ClusterConfig, Config
from selfguide.spec.config.cluster import check_cluster
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.validate import validate
from shards.errors import UserError

GOLDEN = Path(__file__).parent / "golden_sites"
EXAMPLES = ("example_a100", "example_h100")
JOBS = ("training", "successor", "evaluation", "watcher")


@functools.cache
def example(name: str) -> Config:
    """The example site for the runs of all tests."""
    return compose(["experiment=in1k_dit", "nodes=4", f"cluster={name}", "runs=/project/runs"])


def script(config: Config, which: str) -> str:
    """The batch script of one job of a first attempt."""
    at = Attempt(Path(config.runs) / config.experiment / "RUN" / "attempts" / "0001")
    job = {
        "training": lambda: jobs.training(config, at, "RUN"),
        "successor": lambda: jobs.successor(config, at, "RUN"),
        "evaluation": lambda: jobs.evaluation(config, at, "RUN", at.run.evals / "request.json"),
        "watcher": lambda: jobs.watcher(config, at, "RUN", watch.entry, "17"),
    }[which]()
    made = backends.of(config.cluster).script(job)
    assert made is not None
    return made


def lines(config: Config, which: str) -> list[str]:
    return script(config, which).splitlines()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("which", JOBS)
def test_scripts_of_example_sites_are_the_golden_ones(name: str, which: str) -> None:
    made = script(example(name), which)
    golden = (GOLDEN / f"{name}_{which}.sh").read_text()
    assert made + "\n" == golden.replace("{python}", sys.executable)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_site_dry_run_answers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["experiment=in1k_dit", f"cluster={name}", "nodes=4", "dry_run=true"]) == 0
    assert "#SBATCH --partition=" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_sites_are_in_the_guide(name: str) -> None:
    text = (REPOSITORY / "docs" / "cluster.md").read_text()
    assert (REPOSITORY / "configs" / "cluster" / f"{name}.yaml").read_text() in text


def test_config_with_a_site_is_read_back_from_the_run_folder(tmp_path: Path) -> None:
    config = example("example_h100")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config


def test_requeue_in_a_container_asks_with_the_python_inside() -> None:
    pyxis = compose(["experiment=in1k_dit", "cluster=example_h100", "cluster.restart=requeue"])
    asks = [line for line in lines(pyxis, "training") if "scontrol requeue" in line]
    assert len(asks) == 1 and asks[0].startswith("srun --nodes=1 --ntasks=1 --container-image=")
    assert " python3 -m launcher.successor " in asks[0]
    prefix = ["cluster=slurm", "cluster.restart=requeue", "cluster.container='run image.sif'"]
    asks = [
        line
        for line in lines(compose(["experiment=in1k_dit", *prefix]), "training")
        if "scontrol" in line
    ]
    assert asks[0].startswith(f"run image.sif {sys.executable} -m launcher.successor ")


def test_without_evaluation_partition_small_jobs_stand_where_training_does() -> None:
    site = [
        "cluster=slurm",
        "cluster.partition=gpu",
        "cluster.constraint=a100",
        "cluster.reservation=spring",
    ]
    config = compose(["experiment=in1k_dit", *site])
    for which in JOBS:
        assert {
            "#SBATCH --partition=gpu",
            "#SBATCH --constraint=a100",
            "#SBATCH --reservation=spring",
        } <= {*lines(config, which)}


def test_watcher_on_a_partition_of_its_own_renews_itself_within_its_limit() -> None:
    config = example("example_h100")
    assert "#SBATCH --time=60" in lines(config, "watcher")
    assert watch.renewal(config, 0.0) == 3600.0 - watch.RENEW_S


def test_site_warning_is_the_least(tmp_path: Path) -> None:
    config = compose(["experiment=in1k_dit", "cluster=slurm", "cluster.warn_s=100"])
    assert jobs.warning(config, 10.0) == 100 and jobs.warning(config, 100.0) == 260


def cluster(*more: str) -> ClusterConfig:
    found = compose_cluster(["cluster=slurm", *more])
    check_cluster(found, 1)
    return found


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("signal=USR1@60", "cluster.warn_s"),
        ("mem=4G", "cluster.mem_gb"),
        ("ntasks_per_node=4", "cluster.gpus_per_node"),
        ("time=60", "cluster.timeout_min"),
        ("requeue=true", "cluster.restart"),
        ("exclusive=true", "cluster.exclusive"),
        ("dependency=singleton", "drop it"),
        ("output=x", "drop it"),
        ("comment=mine", "cluster.comment"),
        ("nodelist=n1", "cluster.nodelist"),
        ("array=0-3", "drop it"),
    ],
)
def test_free_option_that_something_else_decides_is_refused(option: str, key: str) -> None:
    with pytest.raises(UserError) as raised:
        cluster(f"cluster.sbatch.{option}")
    assert key in str(raised.value)


def test_nodes_shared_by_one_users_jobs_are_a_free_option() -> None:
    assert cluster("cluster.sbatch.exclusive=user").sbatch_options == {"exclusive": "user"}
    with pytest.raises(UserError, match="decided by cluster"):
        cluster("cluster.sbatch.exclusive=user", "cluster.exclusive=true")


@pytest.mark.parametrize("key", ["partition", "comment", "constraint", "sbatch.wckey", "qos"])
def test_a_new_line_in_what_becomes_a_line_of_a_script_is_refused(key: str) -> None:
    with pytest.raises(UserError) as raised:
        cluster(f"cluster.{key}=a\n#SBATCH --uid=0")
    assert f"cluster.{key}=" in str(raised.value)


@pytest.mark.parametrize("value", ["2d", "UNLIMITED", "1:2:3:4", "1-", "24h"])
def test_a_length_of_time_that_is_none_is_refused_with_a_form_that_is(value: str) -> None:
    with pytest.raises(UserError, match=r"minutes, or .*1-12:00:00"):
        cluster(f"cluster.timeout_min={value}")


def test_free_options_are_written_and_may_be_taken_back() -> None:
    found = cluster("cluster.sbatch={mail-user: me@here, spread-job: true, hint: null, x11: false}")
    assert found.sbatch_options == {"mail-user": "me@here", "spread-job": True}


@pytest.mark.parametrize(
    "wrong",
    [
        ["cluster.sbatch.p=gpu"],
        ["cluster.srun=['--ntasks=4']"],
        ["cluster.srun=['-n4']"],
        ["cluster.gpu_type=a100", "cluster.gres=gpu:a100:8"],
        ["cluster.gres=gpu:h100:4"],
        ["cluster.gpu_type=a100", "cluster.request_gpus=false"],
        ["cluster.scratch='$(rm x)'"],
        ["cluster.warn_s=0"],
        ["cluster.environment.SELFGUIDE_NOTIFY=json://x"],
    ],
)
def test_site_that_contradicts_itself_is_refused(wrong: list[str]) -> None:
    from selfguide.spec.config.laws import check

    with pytest.raises(UserError, match=r"cluster\."):
        check(cluster(*wrong), "cluster")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user's own profiles."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "selfguide" / "cluster"
    folder.mkdir(parents=True)
    (folder / "lab.yaml").write_text("defaults: [base]\npartition: gpu\n")
    (folder / "base.yaml").write_text("defaults: [slurm]\naccount: me\ngpus_per_node: 4\n")
    return folder


def test_profile_in_the_home_is_found_by_its_name(elsewhere: Path) -> None:
    found = compose_cluster(["cluster=lab", "cluster.qos=high"])
    assert (found.kind, found.account, found.partition) == ("slurm", "me", "gpu")
    assert (found.gpus_per_node, found.cpus_per_task, found.qos) == (4, 8, "high")
    assert {"lab", "base", "slurm"} <= set(options("cluster"))


def test_profile_of_a_folder_that_an_administrator_names_comes_before_the_home(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "cluster").mkdir(parents=True)
    (tmp_path / "site" / "cluster" / "lab.yaml").write_text("kind: slurm\naccount: all\n")
    monkeypatch.setenv("SELFGUIDE_CONFIGS", str(tmp_path / "site"))
    assert compose_cluster(["cluster=lab"]).account == "all"


def test_profile_by_its_path_may_have_the_name_of_ours(elsewhere: Path, tmp_path: Path) -> None:
    path = tmp_path / "slurm.yaml"
    path.write_text("defaults: [slurm]\naccount: mine\n")
    assert compose_cluster([f"cluster={path}"]).account == "mine"
    assert compose_cluster(["cluster=slurm"]).account is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("- a", "lab"),
        ("kind: [", "lab"),
        ("partition: x", "lab"),
        ("kind: slurm", "slurm"),
        (None, "./no.yaml"),
    ],
)
def test_profile_that_cannot_be_meant_is_one_line_with_its_name(
    elsewhere: Path, text: str | None, value: str
) -> None:
    if text is not None:
        (elsewhere / f"{value}.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        compose_cluster([f"cluster={value}"])
    assert "\n" not in str(raised.value)


def test_unknown_name_says_where_profiles_are_kept(elsewhere: Path) -> None:
    with pytest.raises(UserError, match=str(elsewhere)):
        compose_cluster(["cluster=lap"])


@pytest.mark.parametrize(
    ("site", "asked"),
    [
        (["cluster.gpus_per_node=8"], "--gpus-per-node=4"),
        (["cluster.gpu_type=h100"], "--gpus-per-node=h100:4"),
        (["cluster.gres=gpu:h100:8"], "--gres=gpu:h100:4"),
        (["cluster.gres='gpu:h100:8,tmp:9'"], "--gres=gpu:h100:4,tmp:9"),
    ],
)
def test_evaluation_on_several_ranks_asks_for_a_gpu_of_each(site: list[str], asked: str) -> None:
    words = ["experiment=in1k_dit", "cluster=slurm", "evaluation=fid_adm", "evaluation.ranks=4"]
    config = compose([*words, *site])
    assert {f"#SBATCH {asked}", "#SBATCH --ntasks-per-node=4"} <= {*lines(config, "evaluation")}
    validate(config)
    with pytest.raises(UserError):
        validate(compose([*words, *site, "evaluation.ranks=16"]))


def test_evaluation_on_one_machine_has_the_gpus_that_training_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "gpus", lambda: ["0", "1", "2"])
    words = ["experiment=in1k_dit", "cluster=local", "cluster.gpus_per_node=2"]

    def devices(*more: str, idle: bool = False) -> tuple[str, ...]:
        at = Attempt(tmp_path / "run" / "attempts" / "0001")
        config = compose([*words, *more])
        return jobs.evaluation(config, at, "RUN", tmp_path / "request.json", idle=idle).devices

    assert devices("evaluation=fid_adm") == ("2",)
    assert devices("evaluation=fid_adm", idle=True) == ("0",)
    # a rank without a GPU of its own would share one
    assert devices("evaluation=fid_adm", "evaluation.ranks=2") == ()
    assert devices("evaluation=fd_digits", "experiment=digits_dit") == ()
