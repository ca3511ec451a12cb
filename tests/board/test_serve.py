"""The server reads, answers only those who may ask, and says what to do where it cannot start."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.board import __main__ as command
from launcher.board import serve
from shards.errors import UserError
from tests.board import fakes

TOKEN = "0123456789abcdef"


class Client:
    """Calls the application as a web server would."""

    def __init__(self, root: Path, token: str | None = None) -> None:
        self.live = serve.Live(root, None, every_s=0.0)
        self.app = serve.application(self.live, token=token)

    def get(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        return asyncio.run(self._get(path, method, {"host": "127.0.0.1", **headers}))

    async def _get(
        self, path: str, method: str, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        where, _, query = path.partition("?")
        scope = {
            "type": "http", "method": method, "path": where, "raw_path": where.encode(),
            "query_string": query.encode(), "scheme": "http", "server": ("127.0.0.1", 1),
            "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            # nobody goes away before the answer
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answer, b"".join(each.get("body", b"") for each in sent[1:])


def test_the_page_has_a_tag_that_changes_with_the_runs(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    client = Client(tmp_path)
    status, headers, page = client.get("/")
    assert status == 200 and b"digits_dit" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert client.get("/", if_none_match=headers["etag"])[0] == 304
    fakes.add_record(run, 192_000, {"fd_digits": 6.0})
    status, later, _ = client.get("/", if_none_match=headers["etag"])
    assert status == 200 and later["etag"] != headers["etag"]


def test_data_logs_and_pictures_of_runs_and_of_nothing_else(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    fakes.add_record(run, 192_000, {"fd_digits": 6.0}, grid=Image.new("L", (4, 4)))
    (run.attempt(1) / "job").mkdir()
    (run.attempt(1) / "job" / "7_0_log.out").write_text("a\nb\nc\n")
    client, at = Client(tmp_path), f"/runs/digits_dit/{run.root.name}"
    assert client.get(f"{at}/log?lines=2")[2] == b"b\nc"
    assert client.get(f"{at}.json")[0] == 200
    (picture,) = run.evals.glob("*.png")
    status, headers, body = client.get(f"{at}/grid/{picture.name}")
    assert (status, headers["content-type"]) == (200, "image/png") and body == picture.read_bytes()
    assert client.get("/board.json?filter=fd_digits<7.5")[0] == 200
    assert client.get("/board.json?filter=nothing=1")[0] == 400
    for path in (
        f"{at}/grid/../../run.png",
        "/runs/digits_dit/nobody.json",
        "/run.json",
        f"{at}/evals",
    ):
        assert client.get(path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.get("/", method)[0] == 405
    assert client.get("/", "HEAD")[0] == 200
    # Python reads no number of so many digits
    assert client.get(f"{at}/log?lines={'9' * 5000}")[2] == b"a\nb\nc"
    assert client.get("/board.json?protocol=&sort=&filter=")[0] == 200
    assert client.get("/", host="evil.example")[0] == 400


def test_who_looks_must_know_the_token(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    client = Client(tmp_path, TOKEN)
    for given in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"cookie": f"{serve.COOKIE}=no"}):
        status, headers, body = client.get("/", **given)
        assert status == 401 and b"digits" not in body and "content-security-policy" in headers
    assert client.get("/?token=\u00e9".encode().decode("latin-1"))[0] == 401
    assert client.get("/", authorization=f"Bearer {TOKEN}")[0] == 200
    status, headers, _ = client.get(f"/?token={TOKEN}")
    assert (
        status == 303 and TOKEN not in headers["location"] and "HttpOnly" in headers["set-cookie"]
    )
    cookie = headers["set-cookie"].split(";")[0]
    assert client.get("/", cookie=cookie)[0] == 200
    # of a browser that was here before
    assert client.get(f"/?token={TOKEN}", cookie=cookie)[0] == 303


def test_a_runs_folder_that_goes_away_is_told_and_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = fakes.finished_run(root, "digits_dit", 0, 7.0)
    client = Client(root)
    assert run.root.name.encode() in client.get("/")[2]
    root.rename(tmp_path / "away")
    status, _, page = client.get("/")
    assert status == 200 and b"is gone" in page and run.root.name.encode() not in page
    (tmp_path / "away").rename(root)
    page = client.get("/")[2]
    assert b"is gone" not in page and run.root.name.encode() in page


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
def test_any_address_of_this_machine_s_own_is_answered(tmp_path: Path, host: str) -> None:
    client = Client(tmp_path)
    client.app = serve.application(client.live, host=host)
    named = f"[{host}]" if ":" in host else host
    assert client.get("/board.json", host=f"{named}:8765")[0] == 200
    assert client.get("/board.json", host="evil.example")[0] == 400


def options(tmp_path: Path, **given: Any) -> argparse.Namespace:
    told = {
        "runs": tmp_path,
        "metric": None,
        "host": "127.0.0.1",
        "port": 0,
        "token": None,
        "every": 5.0,
    }
    return argparse.Namespace(**(told | given))


@pytest.mark.parametrize(
    "given",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"token": "short"},
        {"token": "blank " * 3 + "\n"},
        {"host": "no.such.host.invalid", "token": TOKEN},
        {"port": 70_000},
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        serve.serve(options(tmp_path, **given))


def test_a_port_that_is_taken_is_refused_with_one_that_is_free(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError) as refused:
            serve.serve(options(tmp_path, port=taken.getsockname()[1]))
    free = int(str(refused.value).rpartition("--port ")[2])
    with socket.socket() as found:
        found.bind(("127.0.0.1", free))


def test_ctrl_c_ends_it_well(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    line = [sys.executable, "-m", "launcher.board", "serve", "--runs", str(tmp_path)]
    line += ["--port", "0", "--token", f"@{secret}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        address = server.stdout.readline().split()[0]
        asked = urllib.request.Request(
            address.partition("?")[0], headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert server.stderr.read() == ""


def test_a_page_that_cannot_be_written_names_another_way(tmp_path: Path) -> None:
    fakes.finished_run(tmp_path / "runs", "digits_dit", 0, 7.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        command.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "file" / "b.html")])
    assert "launcher.board ls" in str(refused.value)
    assert command.main(["ls", "--runs", str(tmp_path / "runs")]) == 0
