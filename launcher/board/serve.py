"""The board over HTTP, read-only: the page, its data, and what a page in a file cannot hold, logs and pictures.

    GET /                            the page; an ETag, so that asking again costs nothing while nothing has changed
    GET /board.json                  `python -m launcher.board ls --json`; takes the same metric, protocol, filter, sort
    GET /runs/EXPERIMENT/ID.json     everything about one run
    GET /runs/EXPERIMENT/ID/log      the end of its log (?lines=, 200), as text
    GET /runs/EXPERIMENT/ID/grid/NAME.png    the picture of the samples of evaluation NAME, KEY.ATTEMPT

Nothing is written, and no path of a request is opened: names are looked up among the runs that were read. It listens on
this machine alone unless a token says who may look; names other than its own are refused, so that no page elsewhere can
ask through a browser. Each look at the runs asks files for their size and time, and opens those that have changed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import hmac
import ipaddress
import json
import math
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.board import detail, plain
from launcher.board.collect import Board, collect
from launcher.board.page import Renderer, encoded
from launcher.board.read import Everything, Reader, Run
from launcher.board.views import chosen
from shards.errors import UserError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "selfguide-board"
# of a browser that has the page open for days
LOG_LINES, MOST_LINES = 200, 5000
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# of answers that are no page
STRICT = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The runs as they were read at one moment, and what was made of them."""

    read: Everything
    board: Board
    page: bytes
    # of the page
    tag: str
    # seconds since 1970 when these facts were first seen
    since: float


class Live:
    """Reads the runs when somebody asks, at most so often."""

    def __init__(self, runs: Path, metric: str | None, every_s: float) -> None:
        self._root, self._metric, self._every_s = runs, metric, every_s
        self._reader = Reader()
        self._renderer = Renderer()
        self._lock = threading.Lock()
        self._seen: Seen | None = None
        self._read = -float("inf")

    def seen(self) -> Seen:
        """The runs as they are, or were up to `every_s` ago."""
        with self._lock:
            if self._seen is None or time.monotonic() - self._read >= self._every_s:
                self._seen = self._refreshed(self._seen)
                self._read = time.monotonic()
            return self._seen

    def _refreshed(self, before: Seen | None) -> Seen:
        read = self._reader.read_all(self._root)
        if before is not None and read == before.read:
            return before
        board = collect(*read, metric=self._metric)
        now = time.time()
        page = encoded(self._renderer.render(board, built=now))
        tag = hashlib.sha256(page).hexdigest()[:32]
        return Seen(read=read, board=board, page=page, tag=f'"{tag}"', since=now)


def serve(options: argparse.Namespace) -> int:
    """Serves until Ctrl-C.

    Raises:
        UserError: the packages are not installed, the port is taken, or it would be open to others without a token.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError(
            "serve needs starlette and uvicorn: pip install 'selfguide[board]'; "
            "python -m launcher.board build writes the page to a file without them"
        ) from error
    if not 0 <= options.every < math.inf:
        raise UserError(f"--every {options.every:g} is no number of seconds: give 0 or more")
    token = _token(options.token)
    _check_open(options, token)
    live = Live(options.runs, options.metric, options.every)
    listening = _listen(options)
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        application(live, token=token, host=host),
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    with listening, contextlib.suppress(KeyboardInterrupt):
        # the page is ready when its address is there to be clicked
        live.seen()
        # what stays until the end need not be looked through again and again
        gc.freeze()
        print(
            f"http://{_in_address(host)}:{port}/{f'?token={token}' if token else ''} (Ctrl-C ends it)",
            flush=True,
        )
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def _token(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        token = given
    else:
        try:
            token = Path(given[1:]).expanduser().read_text().strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"--token {given} is no file of text: write a token of 16 characters or more of ASCII into one"
            ) from error
    if token is not None and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        raise UserError(
            f"--token has {len(token)} characters: take 16 or more of ASCII, such as {secrets.token_hex(16)}"
        )
    return token


def _check_open(options: argparse.Namespace, token: str | None) -> None:
    if token is None and not _is_local(options.host):
        raise UserError(
            f"--host {options.host} lets others of the network look: add --token {secrets.token_hex(16)}, "
            "or leave --host out and come through ssh -L"
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_address(host: str) -> str:
    """As it stands in an address, where one that holds colons is in brackets."""
    return f"[{host}]" if ":" in host else host


def _listen(options: argparse.Namespace) -> socket.socket:
    # the resolver would take it modulo 65,536
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port {options.port} is none: give one from 0 to 65535, or leave it out")
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"--host {options.host} --port {options.port} is no address of this machine: {error}; "
            "leave both out for http://127.0.0.1:8765"
        ) from error
    family, kind, _, _, address = found[0]
    listening = socket.socket(family, kind)
    # a port of a server that has just ended
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--port {options.port} on {options.host} cannot be had: {error}; give --port {_free(family, options.host)}"
        ) from error
    return listening


def _free(family: int, host: str) -> int:
    """A port that is free now; 0, which takes any, where the host is not of this machine."""
    with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
    return 0


# ---- answers -----------------------------------------------------------------------------------------


def application(live: Live, *, token: str | None = None, host: str = "127.0.0.1") -> Starlette:
    """The ASGI application: every route reads, and nothing else is there."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    # this machine has more addresses of its own than the usual ones, such as 127.0.0.2
    names = ["127.0.0.1", "localhost", "[::1]", _in_address(host)] if _is_local(host) else ["*"]
    answers = _Answers(live)
    return Starlette(
        routes=[
            Route("/", answers.page),
            Route("/board.json", answers.board),
            Route("/runs/{experiment}/{run}.json", answers.run),
            Route("/runs/{experiment}/{run}/log", answers.log),
            Route("/runs/{experiment}/{run}/grid/{name}.png", answers.grid),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=names),
            Middleware(_Guard, token=token),
        ],
        exception_handlers={UserError: _refused},
    )


class _Guard:
    """Lets in who knows the token, and puts headers on every answer."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, RedirectResponse

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def headed(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                # a browser puts the headers of a 304 upon the page that it has kept, whose policy lets its script run
                if message["status"] != 304:
                    headers.setdefault("Content-Security-Policy", STRICT)
            await send(message)

        given = request.query_params.get("token")
        if self._token is not None and self._knows(given):
            # the address bar and the history need not keep it, also of a browser that was here before
            answer: Response = RedirectResponse(request.url.remove_query_params("token"), 303)
            # lax: a strict cookie would not come back where somebody follows a link in a mail or a chat, and answers
            # are only read
            answer.set_cookie(COOKIE, self._token, httponly=True, samesite="lax")
            await answer(scope, receive, headed)
        elif (
            self._token is None or self._knows(request.cookies.get(COOKIE)) or self._bears(request)
        ):
            await self._app(scope, receive, headed)
        else:
            text = "a token is needed: open the address that the server printed"
            answer = PlainTextResponse(text, 401, {"WWW-Authenticate": "Bearer"})
            await answer(scope, receive, headed)

    def _bears(self, request: Request) -> bool:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self._knows(given)

    def _knows(self, given: str | None) -> bool:
        """Whether it is the token; takes as long whatever the first character that differs."""
        return (
            given is not None
            and self._token is not None
            and hmac.compare_digest(given.encode(), self._token.encode())
        )


class _Answers:
    """One method for each route; they run in threads, since reading waits for disks."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        seen = self._live.seen()
        if _same(request, seen.tag):
            return _unchanged(seen.tag)
        return HTMLResponse(seen.page, headers={"ETag": seen.tag, **_policy(seen.page)})

    def board(self, request: Request) -> Response:
        asked, seen = request.query_params, self._live.seen()
        board = seen.board
        if asked.get("metric"):
            board = collect(*seen.read, metric=asked["metric"])
        shown = chosen(
            board,
            protocol=asked.get("protocol") or None,
            text=asked.get("filter", ""),
            sort=asked.get("sort") or None,
            reverse=asked.get("reverse", "") not in ("", "0", "false"),
        )
        return _json(request, {"since": seen.since, **plain.of_board(shown)})

    def run(self, request: Request) -> Response:
        return _json(request, plain.of_run(self._run(request)))

    def log(self, request: Request) -> Response:
        from starlette.responses import PlainTextResponse

        asked = request.query_params.get("lines", str(LOG_LINES))
        # Python reads no number of thousands of digits
        lines = int(asked[:9]) if asked.isdecimal() else LOG_LINES
        return PlainTextResponse(
            detail.log_tail(self._run(request), max(1, min(lines, MOST_LINES)))
        )

    def grid(self, request: Request) -> Response:
        from starlette.exceptions import HTTPException
        from starlette.responses import FileResponse

        run, name = self._run(request), request.path_params["name"]
        for record in run.records:
            if f"{record.key}.{record.attempt}" == name:
                picture = record.grid(run.folder)
                if picture is not None:
                    return FileResponse(picture, media_type="image/png")
        raise HTTPException(404)

    def _run(self, request: Request) -> Run:
        from starlette.exceptions import HTTPException

        wanted = (request.path_params["experiment"], request.path_params["run"])
        for run in self._live.seen().read.runs:
            if (run.experiment, run.id) == wanted:
                return run
        raise HTTPException(404)


def _json(request: Request, value: Mapping[str, Any]) -> Response:
    from starlette.responses import Response

    text = json.dumps(plain.finite(value), allow_nan=False, default=str)
    tag = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
    if _same(request, tag):
        return _unchanged(tag)
    return Response(text, media_type="application/json", headers={"ETag": tag})


def _same(request: Request, tag: str) -> bool:
    given = request.headers.get("if-none-match", "")
    return tag in (each.strip().removeprefix("W/") for each in given.split(","))


def _unchanged(tag: str) -> Response:
    from starlette.responses import Response

    return Response(status_code=304, headers={"ETag": tag})


def _policy(page: bytes) -> dict[str, str]:
    """The page's own policy as a header, which may also ask this server; a policy in the page cannot forbid frames."""
    begins = b'http-equiv="Content-Security-Policy" content="'
    _, found, rest = page.partition(begins)
    own = rest[: rest.find(b'"')].decode().replace("&#39;", "'") if found else STRICT
    return {"Content-Security-Policy": f"{own}; frame-ancestors 'none'"}


async def _refused(request: Request, error: Exception) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": str(error)}, 400)
