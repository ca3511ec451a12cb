"""The development cluster is a real Slurm: it runs jobs, accounts for them, and leaves no trace."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from slurm import hosts, layout, processes
from slurm.devcluster import Cluster, down, find, status, up

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


def ask(cluster: Cluster, *command: str) -> str:
    """What a Slurm command answers; SLURM_* of an outer job would change its meaning."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(
        command, env={**clean, **cluster.environment()}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


def until(holds: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def traces(state: Path) -> list[str]:
    """An oracle of its own: whatever in the process table, or on disk, still names the folder."""
    needle, found = f"{state}/".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        for file in ("cmdline", "environ"):
            try:
                if needle in (entry / file).read_bytes():
                    found.append(f"{entry.name} {file}")
            except OSError:
                continue  # it ended while we looked
    if state.exists():
        found.append(str(state))
    if str(state) in Path("/etc/hosts").read_text():
        found.append("/etc/hosts")
    return found


def listeners(ports: tuple[int, ...]) -> list[int]:
    def answers(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return [port for port in ports if answers(port)]


def recorded(state: Path) -> layout.Record:
    record = layout.read_record(state)
    assert record is not None
    return record


def test_eight_ranks_run_on_four_nodes_with_two_gpus_each(devcluster: Cluster) -> None:
    line = "echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    shape = ["--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2"]
    rows = [row.split() for row in ask(devcluster, "srun", *shape, "sh", "-c", line).splitlines()]
    assert sorted(int(rank) for rank, *_ in rows) == list(range(8))
    places = {(node, local) for _, local, node, _ in rows}
    assert places == {(node, local) for node in devcluster.nodes for local in "01"}
    assert {gpus for *_, gpus in rows} == {"0,1"}


def test_two_steps_at_once_get_a_gpu_each(devcluster: Cluster) -> None:
    see = "echo $CUDA_VISIBLE_DEVICES"
    node = f"--nodelist={devcluster.nodes[0]}"
    step = f"srun --gres=gpu:1 -n1 --exact sh -c '{see}; sleep 1'"
    both = f"{step} & {step} & wait"
    seen = ask(devcluster, "salloc", "-Q", node, "-n2", "--gres=gpu:2", "bash", "-c", both)
    assert sorted(seen.split()) == ["0", "1"]


def test_batch_job_starts_ranks_and_accounting_sees_its_end(
    devcluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = "srun --ntasks-per-node=2 sh -c 'echo rank $SLURM_PROCID; getent hosts devnode4 | head -n 1'"
    batch = ["sbatch", "--parsable", "--nodes=4", "--ntasks-per-node=2", "--gres=gpu:2"]
    job = ask(devcluster, *batch, "--comment=key", f"--output={out}", f"--wrap={script}").strip()
    fields = ["--noheader", "--parsable2", "--format=State,ExitCode,AllocTRES,Comment"]

    def row() -> str:
        return ask(devcluster, "sacct", "-X", "-j", job, *fields).strip()

    until(lambda: row().startswith("COMPLETED"), f"sacct shows the end of {job}, last: {row()}")
    _, code, resources, comment = row().split("|")
    assert (code, comment) == ("0:0", "key")
    assert {"node=4", "gres/gpu=8"} <= set(resources.split(","))
    lines = out.read_text().splitlines()
    assert sorted(line for line in lines if "rank" in line) == [f"rank {n}" for n in range(8)]
    names = [line for line in lines if "rank" not in line]
    assert len(names) == 8 and all(line.startswith("127.0.0.1") for line in names)


def test_a_failed_job_is_failed_in_accounting(devcluster: Cluster) -> None:
    job = ask(devcluster, "sbatch", "--parsable", "--output=/dev/null", "--wrap=exit 7").strip()
    fields = ["--noheader", "--parsable2", "--format=State,ExitCode"]
    until(
        lambda: ask(devcluster, "sacct", "-X", "-j", job, *fields).strip() == "FAILED|7:0",
        "sacct shows the exit code",
    )


@pytest.mark.parametrize("wrong", ["--partition=nowhere", "--nodes=5", "--gpus-per-node=3"])
def test_what_cannot_run_is_refused_before_it_is_queued(devcluster: Cluster, wrong: str) -> None:
    command = ["sbatch", "--test-only", wrong, "--wrap=true"]
    done = subprocess.run(
        command, env={**os.environ, **devcluster.environment()}, capture_output=True
    )
    assert done.returncode == 1
    assert ask(devcluster, "squeue", "--noheader", "--states=PENDING") == ""


def test_both_partitions_hold_every_node(devcluster: Cluster) -> None:
    rows = ask(devcluster, "sinfo", "--noheader", "--format=%P %D").split("\n")
    assert {"main* 4", "debug 4"} <= set(rows)


def test_second_up_returns_the_cluster_and_refuses_another_shape(devcluster: Cluster) -> None:
    said: list[str] = []
    before = recorded(devcluster.state)
    assert up(devcluster.state, say=said.append) == devcluster
    assert said == [f"already up in {devcluster.state}"]
    assert recorded(devcluster.state) == before
    with pytest.raises(UserError, match=r"nodes=2.*4 nodes.*take it down first"):
        up(devcluster.state, nodes=2)


def test_find_is_quick_and_imports_no_torch(devcluster: Cluster) -> None:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        assert find(devcluster.state) == devcluster
        times.append(time.perf_counter() - began)
    assert statistics.median(times) < 0.05
    code = (
        "import sys, slurm.devcluster; sys.exit(any(m in sys.modules for m in ('torch', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_folder_is_closed_to_others(devcluster: Cluster) -> None:
    assert stat.S_IMODE(devcluster.state.stat().st_mode) == 0o700
    assert stat.S_IMODE((devcluster.state / "munge.key").stat().st_mode) == 0o600


def test_a_cluster_beside_the_first_goes_without_trace(devcluster: Cluster, state: Path) -> None:
    hosts_before = Path("/etc/hosts").read_bytes()
    other = up(state, nodes=1)
    ports = recorded(state).ports
    assert len(listeners(ports)) == 3
    assert not set(ports) & set(recorded(devcluster.state).ports)

    # A job that will not go: it traps SIGTERM, and its child has left session and environment.
    marker = state / "tmp" / "started"
    stubborn = f"trap : TERM; env -i setsid sleep 1017 & touch {marker}; while :; do sleep 1; done"
    wrapped = f"--wrap=srun sh -c '{stubborn}'"
    ask(other, "sbatch", "--output=/dev/null", wrapped)
    until(marker.exists, "the job runs")
    family = processes.members(state)
    assert [p for p in family if p.name == "sleep"]

    down(state)
    assert traces(state) == []
    assert listeners(ports) == []
    assert not [p for p in family if processes.alive(p.pid, p.started)]
    assert Path("/etc/hosts").read_bytes() == hosts_before
    assert ask(devcluster, "srun", "--nodes=4", "echo", "here").split() == ["here"] * 4
    assert status(devcluster.state).word == "up"
    down(state)  # again: there is nothing to do, and that is fine
    assert not state.exists()


def test_the_wreck_of_a_killed_up_is_replaced_and_that_of_a_lost_controller_goes(
    state: Path,
) -> None:
    command = [sys.executable, "-m", "slurm", "up", "--nodes=1", "--state", str(state)]
    upping = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until(
            lambda: (state / "cluster.json").exists() and "mariadbd" in recorded(state).daemons,
            "mariadbd is started",
        )
    finally:
        upping.kill()
        upping.wait()
    wreck = recorded(state)
    assert find(state) is None and status(state).word == "degraded"

    fresh = up(state, nodes=1)
    assert ask(fresh, "srun", "echo", "here") == "here\n"
    assert not any(processes.alive(*at) for at in wreck.daemons.values())

    record = recorded(state)
    os.kill(record.daemons["devnode1"][0], signal.SIGKILL)
    until(lambda: not status(state).daemons["devnode1"], "the node is gone")
    assert status(state).word == "degraded"
    assert find(state) is not None, "a lost node does not make the cluster unreachable"
    os.kill(record.daemons["slurmctld"][0], signal.SIGKILL)
    until(lambda: find(state) is None, "the controller is gone")
    assert status(state).word == "degraded"
    assert traces(state)
    down(state)
    assert traces(state) == []


def test_a_daemon_that_fails_is_named_with_its_log_and_leaves_nothing(
    state: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "slurmdbd"
    broken.write_text("#!/bin/sh\necho 'fatal: the disk is on fire' >&2\nexit 1\n")
    broken.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, "-m", "slurm", "up", "--json", "--state", str(state)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "slurmdbd" in done.stderr and "the disk is on fire" in done.stderr
    assert "Traceback" not in done.stderr
    assert traces(state) == []


def test_commands_answer_in_json_with_exit_codes(devcluster: Cluster, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, dict]:
        command = [sys.executable, "-m", "slurm", *words, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, json.loads(done.stdout)

    code, answer = run("status", "--state", str(devcluster.state))
    assert (code, answer["word"]) == (0, "up")
    assert answer["nodes"] == dict.fromkeys(devcluster.nodes, "idle")
    assert answer["names_resolve"] and all(answer["daemons"].values())
    code, answer = run("env", "--state", str(devcluster.state))
    assert (code, answer) == (0, devcluster.environment())
    code, answer = run("status", "--state", str(tmp_path / "none"))
    assert (code, answer["word"]) == (3, "down")


@pytest.mark.parametrize("command", [up, down])
def test_a_folder_that_holds_other_files_is_left_alone(state: Path, command: Callable) -> None:
    treasure = state / "thesis.tex"
    treasure.write_text("words")
    with pytest.raises(UserError, match="holds other files"):
        command(state)
    assert treasure.read_text() == "words"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 0}, r"nodes=0: .* 1 to 16"),
        ({"gpus": 7}, r"gpus=7: .* 0 to 6"),
        ({"state": Path("/tmp/" + "x" * 80)}, r"85 characters.*--state"),
        ({"state": Path("/tmp/with blank")}, r"letters, digits"),
    ],
)
def test_bad_arguments_say_field_value_and_cure(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        up(**arguments)


def test_down_refuses_inside_a_job_of_the_cluster(
    devcluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(devcluster.conf))
    monkeypatch.setenv("SLURMD_NODENAME", devcluster.nodes[0])
    with pytest.raises(UserError, match="run it from outside"):
        down(devcluster.state)
    assert find(devcluster.state) == devcluster


def test_install_has_nothing_to_do_where_all_is_installed(devcluster: Cluster) -> None:
    done = subprocess.run(["sh", ROOT / "slurm" / "install.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ports_stay_ours_while_held_and_a_daemon_may_listen_on_them() -> None:
    with layout.free_ports(8) as ports, layout.free_ports(8) as others:
        assert len({*ports, *others}) == 16
        with socket.socket() as foreign, pytest.raises(OSError, match="in use"):
            foreign.bind(("", ports[0]))
        with socket.socket() as daemon:
            daemon.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            daemon.bind(("", ports[0]))
            daemon.listen()
            assert listeners(ports) == [ports[0]]


def test_a_number_that_was_given_out_again_is_another_process() -> None:
    me = processes.look(os.getpid())
    assert me is not None and processes.alive(me.pid, me.started)
    assert not processes.alive(me.pid, me.started - 1)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but not yet buried
    assert processes.look(child.pid) is None
    child.wait()


lines = st.lists(st.sampled_from(["127.0.0.1 localhost", "# a comment", "", "::1 six"]), max_size=6)


@given(lines)
def test_blocks_in_the_hosts_file_come_and_go_one_by_one(text: list[str]) -> None:
    original = "".join(line + "\n" for line in text)
    one, two = Path("/a/one"), Path("/a/one/two")
    file = Path(f"/dev/shm/selfguide-hosts-{os.getpid()}")
    try:
        file.write_text(original)
        for cluster in (one, two, one):  # the last one again: still one block
            hosts.add(cluster, ["n1", "n2"], hosts=file)
        assert file.read_text().count("127.0.0.1 n1 n2\n") == 2
        hosts.remove(one, hosts=file)
        assert hosts.present(two, hosts=file) and not hosts.present(one, hosts=file)
        hosts.remove(two, hosts=file)
        hosts.remove(two, hosts=file)
        assert file.read_text() == original
    finally:
        file.unlink()
