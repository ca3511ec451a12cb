"""Messages about runs: which, once each, to a real server, and never at the cost of a run or of a secret."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import payloads
import pytest
from listening import SECRET, listening
from test_restart import FELL, SAVED, USER, a_view, an_attempt
from test_watch import no_watcher
from waiting import until

from launcher import backends, notify, submit, successor, watch
from launcher.backends.local import Local
from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile import act
from launcher.reconcile.news import news
from launcher.reconcile.view import RunView
from selfguide.spec.run import RunFolder, read_record
from shards.errors import UserError

UNSCORED = compose(["experiment=digits_dit", "evaluation=none"])


# ---- what is news ------------------------------------------------------------------------------------


def fell(**more: Any) -> Any:
    return an_attempt(FELL, FELL, **more)


@pytest.mark.parametrize(
    ("key", "view"),
    [
        ("finished-1280", a_view(an_attempt(SAVED, SAVED), snapshots={1280: {}}, config=UNSCORED)),
        # its last snapshot is being scored
        (None, a_view(an_attempt(SAVED, SAVED), snapshots={1280: {}})),
        ("stopped-1", a_view(an_attempt(USER, USER))),
        ("failed-once", a_view(fell())),
        ("failed-once", a_view(fell(), an_attempt(state="running"))),
        # preemptions and cancellations are nothing new
        (None, a_view(an_attempt(SAVED, SAVED))),
        (None, a_view(an_attempt(SAVED, SAVED), an_attempt(state="running"))),
        (None, a_view(fell(cancelled=True))),
        (None, a_view(an_attempt(state="queued"))),
        (None, a_view()),
    ],
)
def test_news_of_a_run_is_its_end_and_its_first_failure(key: str | None, view: RunView) -> None:
    found = news(view)
    assert (found and found.key) == key


def test_failure_where_nothing_goes_on_by_itself_is_its_end() -> None:
    found = news(a_view(fell()), goes_on=False)
    assert found is not None and found.key == "stopped-1" and "it fell" in found.text


# ---- where it goes -----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nobody is to be told."""
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "selfguide"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with listening() as heard:
        yield heard


def test_nobody_is_told_by_default() -> None:
    assert notify.urls() == []
    with pytest.raises(UserError, match=notify.VARIABLE):
        notify.main([])


def test_urls_of_the_home_are_read_where_others_cannot(nobody: Path) -> None:
    path = nobody / "notify"
    path.write_text("# me\njson://localhost\n\n")
    path.chmod(0o600)
    assert notify.urls() == ["json://localhost"]
    path.chmod(0o640)
    assert notify.urls() == []


def test_test_message_arrives_and_its_failure_is_an_exit_code(
    server: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, told = server
    monkeypatch.setenv(notify.VARIABLE, f"{url} {url}/refuse nonsense")
    assert notify.main(["--title", "one", "--text", "two", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"taken": 1, "of": 3}
    assert [(each["title"], each["message"]) for each in told] == [("one", "two")] * 2


@pytest.fixture
def run(
    runs: Path, settings: list[str], payload: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run whose training is over and whose snapshots have no score yet."""
    monkeypatch.setattr(Local, "poll_s", 0.05)
    monkeypatch.setattr(act, "launch_watcher", no_watcher)
    payload(train=payloads.publish_all)
    made = RunFolder(
        Path(submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))["folder"])
    )
    until(lambda: backends.state(read_record(Attempt(made.attempt(1)).job)) == "gone")
    payload(evaluate=payloads.score)
    return made


def test_watcher_tells_once_that_a_run_has_finished_and_keeps_the_secret(
    run: RunFolder, server: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, told = server
    monkeypatch.setenv(notify.VARIABLE, url)
    watch.watch(run.root)
    watch.watch(run.root)
    (message,) = told
    assert message["path"].endswith(SECRET) and run.root.name in message["title"]
    assert "fd_digits 7 at 1,280 images" in message["message"]
    record = read_record(run.root / "notified" / "finished-1280.json")
    assert record is not None and record["sent"] is True
    files = [path for path in run.root.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_successor_tells_of_a_run_that_no_watcher_looks_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rank 0 of a job calls it when training has ended."""
    told: list[str] = []
    monkeypatch.setattr(notify, "_send_apart", lambda title, text: told.append(title) or True)
    monkeypatch.setenv(notify.VARIABLE, "json://localhost")
    ended = replace(a_view(an_attempt(USER, USER)), folder=RunFolder(tmp_path))
    monkeypatch.setattr(successor, "read", lambda run: ended)
    for _ in range(2):
        assert successor.main([str(tmp_path), "--dismiss"]) == 0
    assert len(told) == 1 and "stopped" in told[0]


@pytest.mark.parametrize("answer", ["refuses", "is silent"])
def test_message_that_cannot_be_sent_costs_nothing_and_is_not_sent_again(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = replace(a_view(an_attempt(USER, USER)), folder=RunFolder(tmp_path))
    monkeypatch.setattr(notify, "SEND_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if answer == "is silent" else 1
        monkeypatch.setenv(notify.VARIABLE, f"json://127.0.0.1:{port}")
        notify.tell(stopped)
    record = read_record(tmp_path / "notified" / "stopped-1.json")
    assert record is not None and record["sent"] is False
    monkeypatch.setattr(notify, "_send_apart", lambda *_: pytest.fail("sent again"))
    notify.tell(stopped)


def test_run_without_urls_has_no_folder_of_messages(tmp_path: Path) -> None:
    notify.tell(replace(a_view(an_attempt(USER, USER)), folder=RunFolder(tmp_path)))
    assert not (tmp_path / "notified").exists()
