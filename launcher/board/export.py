"""The rows of a view as CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any, Literal

from shards.errors import UserError

Format = Literal["csv", "json", "parquet"]
FORMATS: tuple[Format, ...] = ("csv", "json", "parquet")
# a spreadsheet would run these as a formula
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def encoded(rows: Sequence[dict[str, Any]], form: Format) -> bytes:
    """The rows of `plain.flat_rows` as the bytes of a file.

    Raises:
        UserError: Parquet without pyarrow.
    """
    if form == "json":
        return (json.dumps(list(rows), indent=1, allow_nan=False) + "\n").encode()
    if form == "csv":
        return _csv(rows).encode()
    return _parquet(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--format parquet needs pyarrow: pip install 'selfguide[sources]', or take --format csv"
        ) from error
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), out)
    return out.getvalue()
