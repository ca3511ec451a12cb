"""The S3 half of storage: ranges that are what was asked for, uploads that the store has verified.

A range counts when status, Content-Range and length agree with the request, and its version where the
caller knows one. An upload counts when the store found its Content-MD5; of a large one also size and
ETag are compared afterwards. Conditional requests are as exclusive as the store makes them.

A fenced publisher uploads in parts even what is small: an unfinished upload is seen by nobody, and a newer attempt can
end it. The publisher uploads, then looks for newer numbers, then completes; the newer attempt shows its number, then
ends the uploads it finds. Whichever comes first, the older one finds the number or its upload gone.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import mmap
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from shards.errors import ChangedError, DamagedError, FencedError
from shards.storage.fence import LEASES, MANIFEST, Fence
from shards.storage.retry import RetryPolicy, TransientError
from shards.storage.s3_requests import ConditionError, Requests, split

PART = 16 << 20  # bytes of a part; what is larger goes up in parts, and parts read well as ranges
SENDERS = 4  # parts on their way at once
_PIECES = (4 << 10, 256 << 10)  # bytes between two looks at the clock, at first and at most
_SLOWEST = 32 << 10  # bytes a second below which a connection is given up
_PUBLISHER = "publisher"  # metadata that tells our own object from another's of the same name


class S3:
    """Objects under s3:// urls; what its methods raise is what `Requests.send` raises, and FileExistsError."""

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self._requests = Requests(policy)

    def exists(self, url: str) -> bool:
        bucket, key = split(url)
        if key:
            try:
                self.stat(url)
                return True
            except FileNotFoundError:
                key = key.rstrip("/") + "/"
        page = self._call(url, "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
        return bool(page.get("Contents"))

    def stat(self, url: str) -> tuple[int, str]:
        found = self._head(url)
        return int(found["ContentLength"]), str(found["ETag"])

    def list(self, folder: str) -> Sequence[str]:
        names = set()
        for page, prefix in self._pages(folder, Delimiter="/"):
            names |= {c["Key"].removeprefix(prefix) for c in page.get("Contents", ())}
            folders = (p["Prefix"] for p in page.get("CommonPrefixes", ()))
            names |= {name.removeprefix(prefix).rstrip("/") for name in folders}
        return sorted(names - {""})

    def files(self, folder: str) -> Sequence[str]:
        found = (
            content["Key"].removeprefix(prefix)
            for page, prefix in self._pages(folder)
            for content in page.get("Contents", ())
        )
        return sorted(n for n in found if n and not any(s.startswith(".") for s in n.split("/")))

    def read(self, url: str, start: int, stop: int, etag: str | None) -> bytes:
        bucket, key = split(url)
        target = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
        if etag:
            target["IfMatch"] = etag

        def attempt(client: Any) -> bytes:
            answer = client.get_object(**target)
            with closing(answer["Body"]) as body:
                _check_range(url, answer, start, stop)
                return _drain(body, self._requests.policy.silence)

        try:
            return self._requests.send(url, attempt)
        except ConditionError as error:
            raise ChangedError(f"{url} is no longer the version {etag}, asked for") from error

    def publish(self, url: str, data: bytes, replace: bool, fence: Fence | None) -> None:
        bucket, key = split(url)
        token = uuid.uuid4().hex
        target = {"Bucket": bucket, "Key": key}
        if len(data) > PART or fence is not None:
            try:
                self._publish_parts(url, target, data, token, replace, fence)
            except FileNotFoundError:
                if fence is None:
                    raise
                # a newer attempt has ended the upload; or, late, one that was overtaken itself: then once more
                self._refuse_overtaken(url, fence)
                self._publish_parts(url, target, data, token, replace, fence)
            return
        try:
            self._call(
                url,
                "put_object",
                **target,
                **({} if replace else {"IfNoneMatch": "*"}),
                Body=data,
                ContentMD5=_md5_base64(data),
                Metadata={_PUBLISHER: token},
            )
        except ConditionError as error:
            self._refuse_unless_ours(url, token, error)

    def publish_file(self, url: str, path: str, replace: bool, fence: Fence | None) -> None:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size <= PART:
                self.publish(url, file.read(), replace, fence)
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.publish(url, data, replace, fence)  # type: ignore[arg-type]  # it has a length and slices

    def delete(self, url: str) -> None:
        bucket, key = split(url)
        if not key.strip("/"):
            raise ValueError(
                f"delete({url!r}) is for objects and folders of a bucket, not all of it"
            )
        below = [c["Key"] for page, _ in self._pages(url) for c in page.get("Contents", ())]
        manifest = key.rstrip("/") + "/" + MANIFEST
        for name in (*(n for n in below if n == manifest), key, *below):
            self._call(url, "delete_object", Bucket=bucket, Key=name)

    def end_attempts(self, place: str, number: int) -> None:
        # its number is seen before what others have prepared is removed: who prepares something later, looks later
        self.publish(f"{place.rstrip('/')}/{LEASES}/{number:04d}", b"", True, None)
        self._abort_uploads(place, lambda *_: True)

    def sync(self, folder: str, names: Sequence[str]) -> None:
        """Nothing to do: an object that exists is durable."""

    def sweep(self, folder: str, older: float) -> Sequence[str]:
        return self._abort_uploads(
            folder, lambda upload, now: (now - upload["Initiated"]).total_seconds() >= older - 1
        )

    def _abort_uploads(self, folder: str, wanted: Callable[[Any, datetime], bool]) -> Sequence[str]:
        """Ends unfinished uploads below `folder`; `wanted` gets each with the time by the store's own clock."""
        bucket, key = split(folder)
        place = {"Bucket": bucket, "Prefix": key.rstrip("/") + "/" if key else ""}
        aborted: set[str] = set()
        while True:
            page = self._call(folder, "list_multipart_uploads", **place)
            # Date is cut to whole seconds, and Swift rounds Initiated up
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for upload in page.get("Uploads", ()):
                if wanted(upload, now):
                    url = f"s3://{bucket}/{upload['Key']}"
                    self._abort(url, upload["UploadId"])
                    aborted.add(url)
            if not page["IsTruncated"]:
                return sorted(aborted)
            place["KeyMarker"] = page["NextKeyMarker"]
            place["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _publish_parts(
        self,
        url: str,
        target: dict[str, str],
        data: bytes,
        token: str,
        replace: bool,
        fence: Fence | None,
    ) -> None:
        upload = self._call(url, "create_multipart_upload", **target, Metadata={_PUBLISHER: token})[
            "UploadId"
        ]

        def send(number: int) -> dict[str, Any]:
            part = data[(number - 1) * PART : number * PART]
            place = {**target, "UploadId": upload, "PartNumber": number}
            sent = self._call(url, "upload_part", **place, Body=part, ContentMD5=_md5_base64(part))
            return {"PartNumber": number, "ETag": sent["ETag"]}

        pool = ThreadPoolExecutor(SENDERS, "s3-parts")
        try:
            parts = [*pool.map(send, range(1, -(-len(data) // PART) + 1))]
            self._refuse_overtaken(url, fence)
            self._complete(url, {**target, "UploadId": upload}, parts, token, replace)
        except BaseException as error:
            pool.shutdown(cancel_futures=True)  # a part that lands after the abort would stay
            try:
                self._abort(url, upload)
            except OSError as second:  # what is left is a sweep's; the first error matters more
                raise error from second
            raise
        finally:
            pool.shutdown()
        self._check_upload(url, data, parts, token)

    def _refuse_overtaken(self, url: str, fence: Fence | None) -> None:
        if fence is None:
            return
        newest = max(
            (int(n) for n in self.list(f"{fence.place.rstrip('/')}/{LEASES}") if n.isdigit()),
            default=0,
        )
        if newest > fence.number:
            raise FencedError(
                f"{url}: attempt {fence.number} was overtaken by attempt {newest} and may not publish"
            )

    def _complete(
        self, url: str, upload: dict[str, str], parts: Sequence[Any], token: str, replace: bool
    ) -> None:
        # Not every store knows a condition on completion; a look before leaves them a short moment.
        if not replace and self._publisher(url) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url)
        condition = {} if replace else {"IfNoneMatch": "*"}
        whole = {"MultipartUpload": {"Parts": parts}}
        try:
            self._call(url, "complete_multipart_upload", **upload, **whole, **condition)
        except ConditionError as error:
            self._refuse_unless_ours(url, token, error)
        except FileNotFoundError:  # an earlier try completed it, and only its answer was lost
            if self._publisher(url) != token:
                raise

    def _check_upload(self, url: str, data: bytes, parts: Sequence[Any], token: str) -> None:
        """Compares size and, where the store's ETags are MD5s, the one S3 makes of those of the parts."""
        found = self._head(url)
        if found.get("Metadata", {}).get(_PUBLISHER) != token:
            return  # somebody has replaced it since
        sums = [_md5(data[i : i + PART]) for i in range(0, len(data), PART)]
        expected = found["ETag"]
        if all(p["ETag"].strip('"') == s.hex() for p, s in zip(parts, sums, strict=True)):
            expected = f'"{_md5(b"".join(sums)).hex()}-{len(sums)}"'
        if (found["ContentLength"], found["ETag"]) != (len(data), expected):
            raise DamagedError(
                f"{url} is not what was sent: {found['ContentLength']:,} bytes with ETag "
                f"{found['ETag']}, not {len(data):,} with {expected}"
            )

    def _refuse_unless_ours(self, url: str, token: str, error: Exception) -> None:
        """A try may have taken effect although its answer was lost; then the next one finds our own."""
        if self._publisher(url) != token:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url) from error

    def _publisher(self, url: str) -> str | None:
        """Who published this object, "" where it does not say; None where there is none."""
        try:
            return str(self._head(url).get("Metadata", {}).get(_PUBLISHER, ""))
        except FileNotFoundError:
            return None

    def _abort(self, url: str, upload: str) -> None:
        bucket, key = split(url)
        try:
            self._call(url, "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        except FileNotFoundError:  # completed or aborted already
            return

    def _head(self, url: str) -> dict[str, Any]:
        bucket, key = split(url)
        if not key:
            raise FileNotFoundError(errno.ENOENT, "a bucket is no object", url)
        return self._call(url, "head_object", Bucket=bucket, Key=key)

    def _pages(self, folder: str, **options: str) -> Iterator[tuple[dict[str, Any], str]]:
        bucket, key = split(folder)
        prefix = key.rstrip("/") + "/" if key else ""
        place = {"Bucket": bucket, "Prefix": prefix, **options}
        while True:
            page = self._call(folder, "list_objects_v2", **place)
            yield page, prefix
            if not page["IsTruncated"]:
                return
            place["ContinuationToken"] = page["NextContinuationToken"]

    def _call(self, url: str, operation: str, **arguments: Any) -> dict[str, Any]:
        return self._requests.send(url, lambda client: getattr(client, operation)(**arguments))


def _check_range(url: str, answer: Any, start: int, stop: int) -> None:
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", answer.get("ContentRange", ""))
    if not found:
        raise TransientError(f"{status} without the range that was asked for")
    first, last, total = found.groups()
    if total != "*" and int(total) < stop:
        raise DamagedError(
            f"{url}: asked for bytes [{start}, {stop}), but the object has {int(total):,}"
        )
    if (int(first), int(last)) != (start, stop - 1):
        raise TransientError("another range than was asked for")
    if answer.get("ContentLength") != stop - start:
        raise TransientError("an answer of another length than its range")


def _drain(body: Any, grace: float) -> bytes:
    """The whole body, at no less than a crawl: a store that drips is a store that hangs."""
    began, got, pieces = time.monotonic(), 0, []
    while piece := body.read(min(max(got, _PIECES[0]), _PIECES[1])):
        pieces.append(piece)
        got += len(piece)
        if time.monotonic() - began > grace + got / _SLOWEST:
            raise TransientError(f"less than {_SLOWEST >> 10} KiB a second")
    return b"".join(pieces)


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _md5_base64(data: bytes) -> str:
    return base64.b64encode(_md5(data)).decode()
