"""One request to S3: passing errors are retried, others become errors that name the place and a cure.

Requests go through botocore, one blocking call per thread. It signs them, refreshes credentials where
possible, and survives a fork as long as each process has its own client. Retries are ours.
"""

from __future__ import annotations

import errno
import functools
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from shards.errors import DamagedError, StoreError, UserError
from shards.storage.retry import RetryPolicy, TransientError, with_retries

if TYPE_CHECKING:
    from botocore.credentials import ReadOnlyCredentials
    from botocore.exceptions import ClientError
    from botocore.loaders import Loader

T = TypeVar("T")

POLICY = RetryPolicy()
_TRANSIENT = {429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    *("SlowDown", "InternalError", "RequestTimeout", "OperationAborted"),
    *("ConditionalRequestConflict", "BadDigest", "XAmzContentSHA256Mismatch"),
}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_EXPIRED_CODES = {"ExpiredToken", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}


class ConditionError(Exception):
    """412: If-Match or If-None-Match did not hold."""


class Requests:
    """Sends requests by the credentials and the endpoint of the environment (AWS_*)."""

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self.policy = policy or POLICY
        self._lock = threading.Lock()
        self._client, self._access = _connect(self.policy)
        self._reached = False
        self._buckets: set[str] = set()  # that are known to exist

    def send(self, url: str, request: Callable[[Any], T]) -> T:
        """`request(client)`, tried again as far as that may help; botocore's errors become ours.

        Args:
            url: what this is about, for errors.

        Raises:
            FileNotFoundError: there is no such object, or no such upload.
            ConditionError: If-Match or If-None-Match did not hold.
            PermissionError: no credentials, or the store refuses them, newly read ones included.
            UserError: no such bucket, or a name or an endpoint that cannot be.
            DamagedError: the object ends before the range.
            StoreError: the budget is spent, or an answer that nothing can be done about.
        """
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        def attempt() -> T:
            client = self._client
            try:
                found = request(client)
            except boto.ClientError as error:
                self._reached = True
                raise self._translate(error, url, client) from error
            except TransientError:
                self._reached = True
                raise
            except boto.ParamValidationError as error:
                raise _no_name(url) from error
            except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
                reason = (
                    f"no credentials ({error}); set AWS_ACCESS_KEY_ID and its like, or a profile"
                )
                raise PermissionError(errno.EACCES, reason, url) from error
            except (
                *(boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError),
                *(boto.CredentialRetrievalError, boto.MetadataRetrievalError, ResponseParserError),
            ) as error:
                if not isinstance(error, boto.ConnectionError):  # a connection stood
                    self._reached = True
                raise TransientError(_plain(error)) from error
            self._reached = True
            return found

        def budget() -> float:
            return self.policy.seconds if self._reached else self.policy.unknown

        return with_retries(
            attempt, f"{url} at {self._client.meta.endpoint_url}", self.policy, budget
        )

    def _translate(self, error: ClientError, url: str, client: Any) -> Exception:
        """What a refusal means."""
        answer: Any = error.response
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(answer.get("Error", {}).get("Code", ""))
        seen = " ".join(dict.fromkeys((str(status), code)))  # an answer without a body has no code
        if status in _TRANSIENT or code in _TRANSIENT_CODES:
            return TransientError(seen)
        if status in (401, 403) or code in _EXPIRED_CODES:
            return self._refused(error, url, client, seen, expired=code in _EXPIRED_CODES)
        if status == 404:
            return self._absent(url, code)
        if status == 412:
            return ConditionError(seen)
        if status == 416:
            return DamagedError(f"{url}: the object ends before the range that was asked for")
        # asked only now: buckets of long ago may have such names
        if status == 400 and not _BUCKET.fullmatch(split(url)[0]):
            return _no_name(url)
        message = answer.get("Error", {}).get("Message", "")
        return StoreError(f"{url} at {client.meta.endpoint_url}: answered {seen}: {message}")

    def _refused(
        self, error: Exception, url: str, client: Any, seen: str, *, expired: bool
    ) -> Exception:
        """Credentials are read anew, from environment and profile; only other ones are tried."""
        with self._lock:
            if self._client is not client:
                return TransientError(f"{seen}, credentials renewed")
            fresh, access = _connect(self.policy)
            if access != self._access:
                self._client, self._access = fresh, access
                return TransientError(f"{seen}, credentials renewed")
        key = access.access_key if access else "none"
        state = (
            "have expired, and environment and profile hold no newer ones"
            if expired
            else ("are refused")
        )
        reason = (
            f"the credentials (access key {key}) {state} ({error}); look at AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the profile, and at what they may do here"
        )
        return PermissionError(errno.EACCES, reason, url)

    def _absent(self, url: str, code: str) -> Exception:
        bucket, _ = split(url)
        if code != "NoSuchBucket" and (bucket in self._buckets or self._has(bucket)):
            self._buckets.add(bucket)
            return FileNotFoundError(errno.ENOENT, "no such object", url)
        if not _BUCKET.fullmatch(bucket):
            return _no_name(url)
        return UserError(
            f"{url}: there is no bucket {bucket!r} at {self._client.meta.endpoint_url}; create it, or "
            "check its name and AWS_ENDPOINT_URL"
        )

    def _has(self, bucket: str) -> bool:
        """Whether the bucket exists: a 404 without a body does not say what is missing."""
        from botocore import exceptions as boto

        try:
            self._client.head_bucket(Bucket=bucket)
        except boto.ClientError as error:
            answer: Any = error.response
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            if status in _TRANSIENT:
                raise TransientError(str(status)) from error
            return bool(status != 404)  # 403: there is one, which we may not look at
        except (boto.ConnectionError, boto.HTTPClientError) as error:
            raise TransientError(_plain(error)) from error
        return True


def _connect(policy: RetryPolicy) -> tuple[Any, ReadOnlyCredentials | None]:
    """A client by what environment and profile say now, and the credentials it has."""
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=policy.connect,
        read_timeout=policy.silence,
        retries={"total_max_attempts": 1},  # `with_retries` tries again, with jitter and a budget
        max_pool_connections=32,
        # checksums of AWS's own that other stores may not know; ours is Content-MD5
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    try:
        client = session.create_client("s3", config=config)
        found = session.get_credentials()
        return client, found.get_frozen_credentials() if found else None
    except (BotoCoreError, ValueError) as error:  # a profile or an endpoint that cannot be
        raise UserError(f"S3 by the AWS_* variables and profile: {error}") from error


@functools.cache
def _loader() -> Loader:
    """botocore's own description of S3, parsed once: it takes longer than the rest of a client."""
    from botocore.loaders import create_loader

    return create_loader()


def split(url: str) -> tuple[str, str]:
    """Bucket and key of s3://bucket/key."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{url!r} names no bucket: give s3://BUCKET/FOLDER")
    return bucket, key


def _no_name(url: str) -> UserError:
    return UserError(
        f"{url} is no name for S3: give s3://BUCKET/FOLDER, a bucket of 3 to 63 lower-case letters, "
        "digits, '.' and '-'"
    )


def _plain(error: Exception) -> str:
    """The kind of error, and its first cause: messages hold addresses and numbers that always differ."""
    cause: BaseException = error
    while cause.__cause__ is not None or cause.__context__ is not None:
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    names = dict.fromkeys((type(error).__name__, type(cause).__name__))
    return " from ".join(names)
