"""The former name of `shards.lock.locked`, until `launcher.submit` and `launcher.watch` use it."""

from __future__ import annotations

from functools import partial

from shards.lock import locked

held = partial(locked, required=False)
