"""A real S3 store for the session, a place of one's own in it for each test, and a proxy that fails on demand.

SELFGUIDE_S3_STORE=rgw runs all tests of this folder against Ceph's gateway instead of Swift (`make test-s3-rgw`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards import storage
from shards.errors import UserError
from shards.storage import s3_requests
from shards.storage.retry import RetryPolicy
from tests.s3.proxy import Proxy
from tools.environments import InstallError
from tools.s3.server import Server, down, up

QUICK = RetryPolicy(
    attempts=6, seconds=15.0, unknown=1.0, first=0.01, longest=0.1, connect=2.0, silence=2.0
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The store, ended whatever happens; skipped with the reason where it cannot be, an error with CI=true."""
    state = tmp_path_factory.mktemp("s3")
    try:
        found = up(state, store=os.environ.get("SELFGUIDE_S3_STORE", "swift"))
    except (UserError, InstallError) as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(f"CI must run the S3 tests. {error}")
        pytest.skip(str(error))
    try:
        yield found
    finally:
        down(state)


@pytest.fixture
def environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """Only the store's own AWS_* variables, whatever the machine has; and few retries."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    none = str(tmp_path / "no-such-file")
    outside = {"AWS_CONFIG_FILE": none, "AWS_SHARED_CREDENTIALS_FILE": none}
    for name, value in {**server.environment(), **outside}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3_requests, "POLICY", QUICK)
    storage.reconnect()
    yield monkeypatch
    storage.reconnect()


@pytest.fixture
def root(server: Server, environment: pytest.MonkeyPatch) -> str:
    """A folder of the test's own; `environment` reaches it."""
    return f"s3://{server.bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def proxy(server: Server, environment: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands between the client and the store from now on."""
    proxy = Proxy(server.endpoint)
    try:
        environment.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.reconnect()
        yield proxy
    finally:
        proxy.close()
