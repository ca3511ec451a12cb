"""Where ranks meet: an address that all of them reach, a port that is free, or an error that names the node."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from selfguide import distributed
from selfguide.distributed import RankInfo, join
from selfguide.spec.nodes import NodeRefused
from selfguide.spec.run import read_record, write_record
from tools.ranks import run_ranks


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SELFGUIDE_HOST", raising=False)
    # what is set here is taken back
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")


def test_join_on_a_node_whose_name_does_not_resolve_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(NodeRefused) as caught:
        join(RankInfo(0, 0, 2), tmp_path / "rendezvous.json")
    assert (caught.value.node, caught.value.check) == ("n1", "address")
    assert not (tmp_path / "rendezvous.json").exists()


def test_join_where_rank_0_offers_loopback_to_another_machine_names_its_node(
    tmp_path: Path,
) -> None:
    meeting = {"host": "127.0.0.1", "port": 1, "world": 2, "machine": "far", "node": "n7"}
    write_record(tmp_path / "rendezvous.json", meeting)
    with pytest.raises(NodeRefused) as caught:
        join(RankInfo(1, 0, 2), tmp_path / "rendezvous.json")
    assert (caught.value.node, caught.value.check) == ("n7", "address")


def test_address_of_a_name_that_means_loopback_is_the_one_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Debian's 127.0.1.1: peers, and Gloo, are to use what the route out of this machine does."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    found = distributed._address()
    name = distributed._interface(found)
    assert found == "127.0.1.1" if name is None else not found.startswith("127.")
    assert distributed._interface("203.0.113.7") is None


@pytest.mark.faults
def test_join_takes_a_port_that_is_free_beside_others(tmp_path: Path) -> None:
    """Several attempts at once on one node, where whatever port one would choose may be taken."""
    code = (
        "import sys; from pathlib import Path; from selfguide.distributed import RankInfo, join, leave\n"
        "join(RankInfo(0, 0, 1), Path(sys.argv[1])); input(); leave()"
    )
    meetings = [tmp_path / f"{number}.json" for number in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE)
        for path in meetings
    ]
    try:
        records = [distributed._await_record(path, 60) for path in meetings]
    finally:
        for rank in ranks:
            rank.communicate(b"\n")
    assert len({record["port"] for record in records}) == 2
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert read_record(meetings[0]) == records[0]


def _long(rank_info: RankInfo) -> tuple[str, str]:
    """What ranks hear of work that takes longer than a collective waits, and of work that fails."""
    # many times the second after which ranks hear of it, for a busy machine
    distributed_c10d._set_pg_timeout(timedelta(seconds=15), dist.group.WORLD)

    def work() -> str:
        assert rank_info.rank == 0
        time.sleep(20)
        return "done"

    def fail() -> str:
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room") as found:
        distributed.on_rank_0_at_length(fail)
    return distributed.on_rank_0_at_length(work), str(found.value)


def test_ranks_wait_for_work_of_rank_0_that_takes_longer_than_a_collective_may() -> None:
    assert run_ranks(2, _long) == [("done", "no room")] * 2
