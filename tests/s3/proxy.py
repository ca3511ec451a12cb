"""A proxy before a real store that does what networks and stores do on a bad day, when a test says so.

    proxy.fail("cut", times=2, method="GET", path="shards/")    the next two such requests
    proxy.fail("unavailable", every=3)                          each third request, for ever
    proxy.expire("key")                                         from now on this access key is refused

Everything else passes unchanged, signatures included: the Host that the client signed is kept.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal[
    "unavailable",  # 503 SlowDown, the request never arrives
    "reset",  # the connection ends without an answer, the request never arrives
    "lost",  # the request takes effect, the answer is lost
    "cut",  # the body ends early, and the connection with it
    "short",  # half the range, under an honest Content-Length and Content-Range
    "understated",  # half the body under an honest Content-Length, but the whole Content-Range
    "shifted",  # as many bytes, from another place, honestly labelled
    "garbled",  # a bit of the answer's Content-Range is wrong
    "unlabelled",  # the range as asked for, but under 200, as if it were the whole object
    "delay",  # the answer comes late
    "drip",  # the answer comes 32 bytes at a time
    "flip",  # a bit in each 1000 bytes of the answer's body is wrong
    "flip_sent",  # the same of the request's body
    "hook",  # something else happens first: `action`
    "expired",  # 403 ExpiredToken, the request never arrives
]
_DROPPED = {"connection", "expect", "transfer-encoding", "keep-alive", "content-length"}


@dataclass(kw_only=True)
class _Fault:
    kind: Kind
    times: float = 1
    method: str = ""
    path: str = ""
    seconds: float = 0.0
    every: int = 1
    action: Callable[[], None] = lambda: None
    met: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if self.method not in ("", method) or self.path not in path or self.times <= 0:
            return False
        self.met += 1
        if self.met % self.every:
            return False
        self.times -= 1
        return True


class Proxy:
    """Listens on a free loopback port; `url` is its endpoint, `seen` what passed: method, path, fault."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.seen: list[tuple[str, str, str]] = []
        self._faults: list[_Fault] = []
        self._expired: set[str] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.proxy = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def fail(self, kind: Kind, **options: Any) -> None:
        """The next `times` (1) requests of `method`, with `path` in their path, one in `every` (1), fail so.

        `seconds` is for delay and drip, `action` for hook.
        """
        with self._lock:
            self._faults.append(_Fault(kind=kind, **options))

    def expire(self, key: str) -> None:
        """Requests that this access key signed are refused as those of an expired token are."""
        self._expired.add(key)

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def count(self, fault: str) -> int:
        """How many requests met this fault; "" counts those that met none."""
        with self._lock:
            return sum(f == fault for _, _, f in self.seen)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def meet(self, method: str, path: str, authorization: str) -> _Fault | None:
        """The fault this request meets, if any; it is written down."""
        with self._lock:
            if any(f"Credential={key}/" in authorization for key in self._expired):
                found: _Fault | None = _Fault(kind="expired")
            else:
                found = next((f for f in self._faults if f.strikes(method, path)), None)
            self.seen.append((method, path, found.kind if found else ""))
            return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for word that its header came

    def log_message(self, format: str, *args: object) -> None:
        """Tests ask `seen` instead."""

    def _handle(self) -> None:
        proxy: Proxy = self.server.proxy  # type: ignore[attr-defined]
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.meet(self.command, self.path, self.headers.get("Authorization", ""))
        kind = fault.kind if fault else ""
        headers = dict(self.headers.items())
        if kind == "unavailable":
            self._answer(503, {}, _error("SlowDown"))
            return
        if kind == "expired":
            self._answer(403, {}, _error("ExpiredToken"))
            return
        if kind == "reset":
            self.close_connection = True
            return
        if kind == "flip_sent":
            sent = _flipped(sent)
        if kind == "hook" and fault:
            fault.action()
        status, found, body = _forward(proxy.upstream, self.command, self.path, headers, sent)
        if kind == "lost":
            self.close_connection = True
            return
        if kind == "delay" and fault:
            time.sleep(fault.seconds)
        if kind == "short":
            body = body[: len(body) // 2]
            found["Content-Range"] = _range(found, keep=len(body), shift=0)
        if kind == "understated":
            body = body[: len(body) // 2]
        if kind == "shifted":
            found["Content-Range"] = _range(found, keep=len(body), shift=1)
        if kind == "garbled":
            found["Content-Range"] = _garbled(found["Content-Range"])
        if kind == "unlabelled":
            status, _ = 200, found.pop("Content-Range", "")
        if kind == "flip":
            body = _flipped(body)
        with suppress(BrokenPipeError, ConnectionResetError):  # the client had enough
            pause = fault.seconds if kind == "drip" and fault else 0.0
            self._answer(status, found, body, cut=kind == "cut", pause=pause)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _answer(
        self,
        status: int,
        headers: dict[str, str],
        body: bytes,
        *,
        cut: bool = False,
        pause: float = 0.0,
    ) -> None:
        self.send_response_only(status)
        length = headers.pop("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if pause:
            for at in range(0, len(body), 32):
                self.wfile.write(body[at : at + 32])
                time.sleep(pause)
        elif cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)


def _forward(
    upstream: str, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, dict[str, str], bytes]:
    """The store's own answer. Host stays the proxy's, because that is what the client signed."""
    kept = {name: value for name, value in headers.items() if name.lower() not in _DROPPED}
    if body or method in ("PUT", "POST"):
        kept["Content-Length"] = str(len(body))
    with closing(http.client.HTTPConnection(upstream, timeout=120)) as connection:
        connection.request(method, path, body=body or None, headers=kept)
        answer = connection.getresponse()
        found = {n: v for n, v in answer.getheaders() if n.lower() not in _DROPPED}
        if method == "HEAD":
            found["Content-Length"] = answer.getheader("Content-Length", "0")
        return answer.status, found, answer.read()


def _error(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>'.encode()


def _flipped(data: bytes) -> bytes:
    wrong = bytearray(data)
    for at in range(len(data) // 2 % 1000, len(data), 1000):
        wrong[at] ^= 1
    return bytes(wrong)


def _garbled(text: str) -> str:
    """The lowest bit of the first digit turned."""
    at = next(i for i, letter in enumerate(text) if letter.isdigit())
    return text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]


def _range(headers: dict[str, str], *, keep: int, shift: int) -> str:
    """An honest label for `keep` bytes that begin `shift` after those asked for."""
    span, total = headers["Content-Range"].removeprefix("bytes ").split("/")
    first = int(span.split("-")[0]) + shift
    return f"bytes {first}-{first + keep - 1}/{total}"
