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
        return _csv(rows).encode(errors="replace")
    return _parquet(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = f"'{value}" if value.startswith(_FORMULA) else value
    # a cell is quoted for the line ends of the file alone, and readers take others for ends too
    return "\n".join(text.splitlines()) if "\r" in text else text


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "--format parquet needs pyarrow: pip install 'selfguide[sources]', or take --format csv"
        ) from error
    plain = [{_encodable(name): _encodable(value) for name, value in row.items()} for row in rows]
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), out)
    return out.getvalue()


def _encodable(value: Any) -> Any:
    """Text that UTF-8 has: names of files on other machines may be no text."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value
