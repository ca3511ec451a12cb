"""The former name of `shards.lock.lock`, until `launcher.submit` and `launcher.watch` use it."""

from __future__ import annotations

from functools import partial

from shards.lock import lock

held = partial(lock, required=False)
