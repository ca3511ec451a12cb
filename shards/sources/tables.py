"""Tables with a column of encoded images: parquet files, and data sets that `datasets` saved to disk.

Both are read by pyarrow. An image is a binary value, or a struct with `bytes` as `datasets` writes it.
Saved data sets are mapped. In parquet files the unit of reading is a row group, and shuffled rows want one
each: files with small row groups (100 rows, as `datasets` writes images) or save_to_disk read faster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, UserError
from shards.format.classes import ordered
from shards.sources.listing import NO_LABEL, Decode, Listing, Passed, expand, folder
from shards.sources.source import Lazy

_GROUPS = 4  # row groups of a parquet file kept at hand
# types by their names, since older versions of pyarrow know no views
_TEXT = ("string", "large_string", "string_view", "bool")
_BINARY = ("binary", "large_binary", "binary_view")


@dataclass(frozen=True, eq=False)
class Saved(Lazy):
    """Rows of Arrow stream files, mapped; opened once a process."""

    paths: tuple[str, ...]
    column: str

    @cached_property
    def values(self) -> Any:
        return _mapped(self.paths).column(self.column)

    def read(self, row: int) -> bytes:
        return _bytes(self.values[row].as_py())


@dataclass(frozen=True, eq=False)
class Parquet(Lazy):
    """Rows of parquet files, by row group; opened once a process."""

    paths: tuple[str, ...]
    column: str

    @cached_property
    def groups(self) -> tuple[list[tuple[Any, int]], NDArray[np.int64]]:
        """(file, number of the group) in order, and the first row of each group, with the end of the last."""
        _, parquet = _pyarrow()
        files = [parquet.ParquetFile(path) for path in self.paths]
        groups = [(file, n) for file in files for n in range(file.metadata.num_row_groups)]
        rows = [file.metadata.row_group(n).num_rows for file, n in groups]
        return groups, np.cumsum([0, *rows], dtype=np.int64)

    @cached_property
    def recent(self) -> Callable[[int], Any]:
        """The column of a group; those asked for last are kept."""
        return lru_cache(_GROUPS)(self._read_group)

    def read(self, row: int) -> bytes:
        _, starts = self.groups
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return _bytes(self.recent(group)[row - int(starts[group])].as_py())

    def _read_group(self, group: int) -> Any:
        file, number = self.groups[0][group]
        return file.read_row_group(number, columns=[self.column]).column(self.column)


def parquet(
    paths: Sequence[str],
    decode: Decode,
    *,
    image: str | None = None,
    label: str | None = None,
    key: str | None = None,
    split: str | None = None,
) -> Listing:
    """Rows of parquet files, or of all of a `split` in a folder; `image`, `label`, `key` name columns.

    Defaults: the column `image`, or the only one of bytes; `label` if there is one; keys are row numbers. Columns of
    whole numbers may be of several widths. Labels that are text are numbered, as `shards.format.classes` orders them.

    Raises:
        UserError: no such files or columns, a column that only some files have, labels of several kinds, a folder of
            several splits, or pyarrow is missing.
    """
    arrow, reader = _pyarrow()
    files = expand(paths, ".parquet", split)
    try:
        schemas = [reader.read_schema(path) for path in files]
        wanted = _columns(files, schemas, image, label, key)
        others = [name for name in wanted[1:] if name]
        tables = [reader.read_table(path, columns=others) for path in files]
        sizes = [reader.read_metadata(path).num_rows for path in files]
    except (arrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        others_too = f" or one of {len(files) - 1:,} more" if len(files) > 1 else ""
        reason = str(error).rstrip(".")
        raise UserError(
            f"{files[0]}{others_too} is no such parquet: {reason}: fetch or write it again"
        ) from None
    passed = _unread(schemas, wanted, label)
    return _listing(
        Path(files[0]).stem, files, sizes, schemas, tables, Parquet, decode, wanted, passed
    )


def saved_dataset(
    path: str,
    decode: Decode,
    *,
    split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    key: str | None = None,
) -> Listing:
    """A data set, or a split of several, that Hugging Face's `save_to_disk` wrote.

    Raises:
        UserError: no such data set, split or columns, or pyarrow is missing.
    """
    arrow, _ = _pyarrow()
    base = folder(path, "saved data set")
    if (base / "dataset_dict.json").is_file():
        splits = json.loads((base / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise UserError(f"split={split!r} is not in {path}: choose among {', '.join(splits)}")
        base = base / str(split)
    if not (base / "state.json").is_file():
        raise UserError(
            f"{path} holds no state.json: name a folder that datasets' save_to_disk wrote"
        )
    names = [f["filename"] for f in json.loads((base / "state.json").read_text())["_data_files"]]
    files = [str(base / name) for name in names]
    try:
        table = _mapped(files)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{base} cannot be read: {error}") from None
    wanted = _columns([str(base)], [table.schema], image, label, key)
    name, sizes = base.resolve().name, [table.num_rows]
    passed = _unread([table.schema], wanted, label)
    return _listing(name, files, sizes, [table.schema], [table], Saved, decode, wanted, passed)


def _unread(
    schemas: Sequence[Any], wanted: Sequence[str | None], asked: str | None
) -> list[Passed]:
    """The other columns, where none is called label and none was asked for: one of them may hold labels."""
    if asked is not None or wanted[1] is not None:
        return []
    others = dict.fromkeys(n for schema in schemas for n in schema.names if n not in wanted)
    return [
        Passed(n, f"a column that is not read: --label {n} takes it for labels") for n in others
    ]


def _listing(
    name: str,
    files: Sequence[str],
    sizes: Sequence[int],
    schemas: Sequence[Any],
    tables: Sequence[Any],
    store: type[Saved] | type[Parquet],
    decode: Decode,
    wanted: tuple[str, str | None, str | None],
    passed: Sequence[Passed],
) -> Listing:
    """Of one schema and table a file, or of one of all files."""
    image, label, key = wanted
    rows = sum(sizes)
    labels, names = _labels(files, schemas, tables, label) if label else (None, ())
    keys = (
        [str(value) for table in tables for value in table.column(key).to_pylist()]
        if key
        else [f"{name}-{row:0{len(str(rows))}d}" for row in range(rows)]
    )
    total = sum(Path(path).stat().st_size for path in files)
    return Listing.of(
        name,
        keys,
        store(tuple(files), image),
        decode=decode,
        places=np.full(rows, total),
        labels=labels,
        class_names=names,
        passed=passed,
    )


def _labels(
    files: Sequence[str], schemas: Sequence[Any], tables: Sequence[Any], label: str
) -> tuple[NDArray[Any], Sequence[str]]:
    """The labels of all rows, and the names of their classes where these are known."""
    columns = [table.column(label) for table in tables]
    missing = sum(column.null_count for column in columns)
    if missing:
        raise UserError(
            f"label column {label!r} has {missing:,} rows without a value: write one into each, or read no labels "
            f"with --label {NO_LABEL}"
        )
    kinds: dict[str, str] = {}
    for path, column in zip(files, columns, strict=False):
        kinds.setdefault(_kind(column.type), f"{column.type} in {path}")
    if len(kinds) > 1:
        raise UserError(
            f"label column {label!r} is {' and '.join(kinds.values())}: bring it to one"
        )
    if not {"text", "whole"}.intersection(kinds):
        raise UserError(
            f"label column {label!r} is {next(iter(kinds.values()))}: write whole numbers or text, or read no labels "
            f"with --label {NO_LABEL}"
        )
    if "text" in kinds:
        texts = [str(value) for column in columns for value in column.to_pylist()]
        names = ordered(texts)
        number = {text: at for at, text in enumerate(names)}
        return np.array([number[text] for text in texts], dtype=np.int64), names
    arrays = [_int64(column.to_numpy()) for column in columns]
    return np.concatenate(arrays), _class_names(files, schemas, label)


def _int64(labels: NDArray[Any]) -> NDArray[np.int64]:
    """What int64 does not hold is no class either, but must not become another number."""
    if labels.dtype == np.uint64:
        labels = np.minimum(labels, np.uint64(np.iinfo(np.int64).max))
    return labels.astype(np.int64)


def _kind(of: Any) -> str:
    types = _pyarrow()[0].types
    if types.is_integer(of):
        return "whole"
    if types.is_dictionary(of):
        return _kind(of.value_type)
    return "text" if str(of) in _TEXT else str(of)


def _columns(
    files: Sequence[str],
    schemas: Sequence[Any],
    image: str | None,
    label: str | None,
    key: str | None,
) -> tuple[str, str | None, str | None]:
    """The columns of images, labels and keys: each is in all files."""
    known = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    if label == NO_LABEL and NO_LABEL not in known:
        label, labelled = None, False
    else:
        labelled = label is not None or "label" in known
    for given, name in (("image", image), ("label", label), ("key", key)):
        if name is not None and name not in known:
            raise UserError(
                f"{given} column {name!r} does not exist: choose among {', '.join(known)}"
            )
    if image is None:
        binary = dict.fromkeys(
            f.name for schema in schemas for f in schema if str(f.type) in _BINARY
        )
        image = "image" if "image" in known else next(iter(binary)) if len(binary) == 1 else None
    if image is None:
        raise UserError(f"which column holds images? Give --image, one of {', '.join(known)}")
    found = image, (label or "label") if labelled else None, key
    for name in found:
        without = [p for p, s in zip(files, schemas, strict=True) if name and name not in s.names]
        if without:
            cure = f", or read no labels with --label {NO_LABEL}" if name == found[1] else ""
            raise UserError(
                f"column {name!r} is in {len(files) - len(without):,} of {len(files):,} files, and not in "
                f"{without[0]}: name the files that have it{cure}"
            )
    return found


def _class_names(files: Sequence[str], schemas: Sequence[Any], label: str) -> Sequence[str]:
    """Of a ClassLabel, where `datasets` left its features in the schema; files that have them have the same."""
    found: dict[tuple[str, ...], str] = {}
    for path, schema in zip(files, schemas, strict=False):
        text = (schema.metadata or {}).get(b"huggingface")
        features = json.loads(text)["info"]["features"] if text else {}
        if names := (features.get(label) or {}).get("names", ()):
            found.setdefault(tuple(names), path)
    if len(found) > 1:
        first, second = [*found.items()][:2]
        raise UserError(
            f"classes of {label!r} are called {', '.join(first[0][:3])} ... in {first[1]} and "
            f"{', '.join(second[0][:3])} ... in {second[1]}: write them with the same names"
        )
    return next(iter(found), ())


def _bytes(value: Any) -> bytes:
    found = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(found, bytes):
        return found
    where = (
        f" but the path {value['path']!r}" if isinstance(value, dict) and value.get("path") else ""
    )
    raise BadInputError(f"the row holds no bytes{where}")


def _mapped(paths: Sequence[str]) -> Any:
    arrow, _ = _pyarrow()
    streams = (arrow.ipc.open_stream(arrow.memory_map(path)) for path in paths)
    return arrow.concat_tables([stream.read_all() for stream in streams])


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "tables need the package pyarrow: pip install 'selfguide[sources]'"
        ) from None
    return pyarrow, pyarrow.parquet
