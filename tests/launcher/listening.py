"""A real HTTP server that hears messages as apprise sends them to `json://`."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

SECRET = "token-2f9c"


@contextmanager
def listening() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the URL of a server, which has a secret in it, and what it was told; below /refuse it refuses."""
    if importlib.util.find_spec("apprise") is None:
        assert os.environ.get("CI", "").lower() not in ("1", "true"), "CI must have apprise"
        pytest.skip("apprise is not installed")
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told.append(body | {"path": self.path})
            self.send_response(500 if "refuse" in self.path else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"json://127.0.0.1:{made.server_port}/{SECRET}", told
    finally:
        made.shutdown()
        made.server_close()
