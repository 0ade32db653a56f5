"""Objects in an S3 bucket: the one door to the S3 client (obstore) and to AWS's credential chain (boto3).

Nothing on the way is trusted, for servers differ: some accept a body that is not the one they were told of.
- Sent: every request's body is signed and carries x-amz-checksum-sha256, so that a server that checks refuses what
  changed on the way (AWS and radosgw do, moto does not). What was stored is then compared by its ETag with the MD5 of
  what was sent (of several parts: the MD5 of the parts' MD5s); where the answer has none (radosgw, of several parts) a
  HEAD tells it. With KMS an ETag is no MD5: there AWS's check of the checksum stands, and the size. Any other ETag
  that differs makes the object be read back; for a bucket that encrypts with KMS by default, set store.sse.
- Kept: every object carries the sha256 of its bytes as metadata.
- Received: the length is compared with the one announced, the sha256 with the one kept; what differs is fetched again.

Each request is tried several times with growing, random waits; a body that breaks is resumed where it broke. What does
not heal is a RemoteError, and a TemporaryRemoteError where it may heal later.

Large files go up in parts, four files at once, and come down as a stream: memory does not grow with them. A put that
fails leaves nothing under the name; a process that is killed leaves parts that a lifecycle rule has to remove
(AbortIncompleteMultipartUpload).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.exceptions
import obstore
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from stages.lib.digests import digest_bytes, digest_file
from stages.lib.errors import ConfigError, DataError, RemoteError
from stages.store.bucket_errors import CREDENTIALS, read_trouble
from stages.store.objects import Listed
from stages.store.paged import every_page
from stages.store.patience import Patience

T = TypeVar("T")
PART_BYTES = 8 << 20  # what a request carries at most; a larger file goes up in parts
PARTS_IN_FLIGHT = 2  # of one file
LARGE_PUTS = threading.BoundedSemaphore(4)  # files that go up in parts at once: bounds memory, and what a slow link has
MAX_PARTS = 10_000  # S3's limit
CHUNK_BYTES = 1 << 20
PAGE = 1000  # names in a page of a listing; S3's limit for one DeleteObjects too
ENCRYPTIONS = (None, "AES256", "aws:kms")
CREDENTIALS_LIVE = timedelta(minutes=9)  # boto3 renews earlier than 10 minutes before they expire


@dataclass(frozen=True)
class Described:
    """What is known of an object without reading it; sha256 is that of its bytes, where its writer stated it."""

    bytes: int
    etag: str
    version: str | None
    sha256: str | None


class DifferentBytesError(RemoteError):
    """What the bucket stored or gave is not what was sent or kept, however often it was tried.

    sha256  of what was given
    """

    def __init__(self, text: str, sha256: str = "") -> None:  # in this order it travels between processes
        super().__init__(text)
        self.sha256 = sha256


class Bucket:
    """Objects under the prefix of an S3 bucket; satisfies `Objects`. May be used by many threads, and pickled.

    endpoint, region, profile   AWS's own defaults where None
    sse, sse_kms_key            encryption by the server: AES256 or aws:kms, and the key's id
    """

    def __init__(self, url: str, *, endpoint: str | None = None, region: str | None = None, profile: str | None = None,
                 sse: str | None = None, sse_kms_key: str | None = None, patience: Patience | None = None) -> None:
        found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])((?:/[\w.~-]+)*)/?", url, re.ASCII)
        if not found or {".", ".."} & set(found[2].split("/")):
            raise ConfigError("store.url is no place in a bucket\n"
                              "  set it to s3://BUCKET/PREFIX, with letters, digits and ._~- and without a key in it")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and not re.fullmatch(r"https?://[\w.:\[\]-]+/?", endpoint, re.ASCII):
            raise ConfigError("store.endpoint is no address of a server\n"
                              "  set it to https://HOST or http://HOST:PORT; credentials belong in AWS's own files")
        if sse not in ENCRYPTIONS or (sse_kms_key and sse != "aws:kms"):
            raise ConfigError(f"store.sse is {sse}\n  set it to AES256 or aws:kms; "
                              "store.sse_kms_key goes with aws:kms alone")
        self.bucket, self.prefix = found[1], found[2].strip("/")
        self.where = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.sse = sse
        self.patience = patience or Patience()
        self._endpoint, self._region, self._profile, self._sse_kms_key = endpoint, region, profile, sse_kms_key
        self._exists = False  # the bucket, as far as is known

    def __getstate__(self) -> dict[str, Any]:
        clients = ("_store", "_sending", "_sending_once")  # each process makes its own
        return {name: value for name, value in vars(self).items() if name not in clients}

    # read ---------------------------------------------------------------------------------------------------------
    def read(self, name: str) -> bytes | None:
        """The whole object; None where it is not there. Raises DifferentBytesError where it is not what was kept."""
        def attempt() -> bytes | None:
            if (got := self._get(name)) is None:
                return None
            data = bytes(got.bytes())
            _compare(got, digest_bytes(data), len(data))
            return data

        return self._patiently(name, attempt)

    def read_range(self, name: str, start: int, stop: int, etag: str) -> bytes:
        """Bytes start to stop - 1 of the object as it was when it had this ETag.

        Raises RemoteError where it is gone or has changed. The answer's own ETag is compared, for servers differ in how
        they take If-Match.
        """
        def attempt() -> bytes:
            got = self._get(name, range=(start, stop))
            if got is None or got.meta["e_tag"] != etag:
                what = "replaced" if got else "removed"
                raise RemoteError(f"{self.where}/{name} was {what} while it was being read\n"
                                  "  recordings do not change: bring it back, or `roadmill scan` what is there now")
            return bytes(got.bytes())

        return self._patiently(name, attempt)

    def download(self, name: str, path: Path) -> str | None:
        """sha256 of what was written to `path`; None where the object is not there.

        Compare it: where the bucket's object itself is damaged, it is that of the damaged bytes.
        """
        def attempt() -> str | None:
            if (got := self._get(name)) is None:
                return None
            sha256, num_bytes = hashlib.sha256(), 0
            with path.open("wb") as file:
                for chunk in got.stream(min_chunk_size=CHUNK_BYTES):
                    sha256.update(chunk)
                    num_bytes += file.write(chunk)
            _compare(got, sha256.hexdigest(), num_bytes)
            return sha256.hexdigest()

        try:
            return self._patiently(name, attempt)
        except DifferentBytesError as error:
            return error.sha256
        except BaseException as error:
            if isinstance(error, OSError) and not error.filename:  # a full disk does not say which
                error.filename = str(path)
            path.unlink(missing_ok=True)
            raise

    def size(self, name: str) -> int | None:
        """Bytes of the object; None where it is not there."""
        found = self.describe(name)
        return found and found.bytes

    def describe(self, name: str) -> Described | None:
        """Size, ETag, version and stated sha256 of the object, by one HEAD; None where it is not there."""
        def attempt() -> Described | None:
            if (got := self._get(name, head=True)) is None:
                return None
            return Described(got.meta["size"], got.meta["e_tag"], got.meta["version"], got.attributes.get("sha256"))

        return self._patiently(name, attempt)

    def names(self, prefix: str) -> Iterator[str]:
        """Names that start with the prefix, in any order."""
        return (found.name for found in self.list(prefix))

    def list(self, prefix: str) -> Iterator[Listed]:
        """Objects whose names start with the prefix, in any order; one that ends within a name should match few."""
        folder, _, begin = prefix.rpartition("/")

        def page(after: str | None) -> list[Listed]:
            stream = obstore.list(self._store, folder or None, offset=after, chunk_size=PAGE)
            found = [Listed(meta["path"], meta["size"], meta["last_modified"].timestamp())
                     for meta in next(stream, [])]
            self._exists = True
            return found

        def asked(after: str | None) -> list[Listed]:
            return self._patiently(prefix, lambda: page(after))

        if not begin:
            return every_page(asked, prefix, PAGE)
        return _while_alike(asked, prefix)

    # write --------------------------------------------------------------------------------------------------------
    def write(self, name: str, data: bytes | Path, sha256: str | None = None) -> None:
        """Keeps bytes, or a copy of a file, instead of what was there; whole and verified, or not at all.

        sha256  that of the data, where it is known: a large file is then read once. Raises DataError where it differs.
        """
        stated = sha256 or (digest_bytes(data) if isinstance(data, bytes) else digest_file(data))
        try:
            self._patiently(name, lambda: self._put(name, data, stated))
        except DifferentBytesError:
            if (found := self.describe(name)) and found.sha256 == stated:
                self.delete([name])
            raise

    def create(self, name: str, data: bytes) -> bool:
        """Keeps bytes (of one request) only where nothing is there; False where something is. One of many wins.

        An attempt that broke may have been kept all the same: then these bytes under the name count as created.
        """
        broken = False

        def attempt() -> bool:
            nonlocal broken
            try:
                done = obstore.put(self._sending_once, name, data, mode="create", use_multipart=False,
                                   attributes={"sha256": digest_bytes(data)})
            except AlreadyExistsError as error:
                if "ConditionalRequestConflict" in str(error):  # a race without a winner yet
                    raise
                return broken and self.read(name) == data
            except BaseError:
                broken = True
                raise
            if not self.is_stored(name, done["e_tag"], etag_of([hashlib.md5(data)]), digest_bytes(data), len(data)):
                self.write(name, data)
            return True

        return self._patiently(name, attempt, self.patience.retries + self.patience.attempts)

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""
        names = iter(names)
        while some := list(itertools.islice(names, PAGE)):
            self._patiently(some[0], lambda some=some: obstore.delete(self._store, some))

    # inside -------------------------------------------------------------------------------------------------------
    def _put(self, name: str, data: bytes | Path, sha256: str) -> None:
        """One attempt to write, compared with what the server says it has."""
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        sums: list[Any] = []

        def parts() -> Iterator[bytes]:
            whole = hashlib.sha256()
            with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
                while part := file.read(part_bytes):
                    sums.append(hashlib.md5(part))
                    whole.update(part)
                    yield part
            if whole.hexdigest() != sha256:
                raise DataError(f"{data if isinstance(data, Path) else name} is not what its sha256 {sha256[:16]}… says"
                                f" ({whole.hexdigest()[:16]}…)\n  it changed while it was being sent, or is damaged; "
                                "run the command again")

        many = size > part_bytes
        with LARGE_PUTS if many else contextlib.nullcontext():  # obstore aborts an upload in parts that fails
            done = obstore.put(self._sending, name, parts() if many else b"".join(parts()), use_multipart=many,
                               chunk_size=part_bytes, max_concurrency=PARTS_IN_FLIGHT, attributes={"sha256": sha256})
        if not self.is_stored(name, done["e_tag"], etag_of(sums, many), sha256, size):
            raise DifferentBytesError(name)

    def is_stored(self, name: str, etag: str, expected: str, sha256: str, size: int) -> bool:
        """Whether the server has what was sent: by the ETag of its answer, of a HEAD, or by the object itself."""
        if etag.strip('"') == expected:
            return True
        found = self.describe(name)
        if found is None or found.sha256 != sha256:  # lost; or another writer came later
            return found is not None and found.sha256 is not None
        if found.etag.strip('"') == expected or self.sse == "aws:kms":
            return found.bytes == size
        got, back = self._get(name), hashlib.sha256()
        for chunk in got.stream(min_chunk_size=CHUNK_BYTES) if got else ():
            back.update(chunk)
        return back.hexdigest() == sha256

    def _get(self, name: str, **options: Any) -> obstore.GetResult | None:
        """The answer to a GET or HEAD; None where the object is not there. A missing bucket is no missing object."""
        try:
            got = obstore.get(self._store, name, options=options)
        except (BaseError, FileNotFoundError) as error:
            missing = isinstance(error, FileNotFoundError)
            unclear = re.search(r"status code: [34]", str(error)) and "<Code>" not in str(error)  # HEAD tells no more
            if unclear and not (missing and self._exists):
                next(obstore.list(self._store, chunk_size=1), None)
            if not missing or "<Code>NoSuchBucket</Code>" in str(error):
                raise
            got = None
        self._exists = True
        return got

    def _patiently(self, name: str, attempt: Callable[[], T], attempts: int = 0) -> T:
        """What one of several attempts gives; the last one's error in our words, without the client's text."""
        for number in range(1, (attempts or self.patience.attempts) + 1):
            if number > 1:
                self.patience.wait(number)
            try:
                return attempt()
            except DifferentBytesError as error:
                trouble = DifferentBytesError(
                    f"{self.where}/{name}: the bytes that arrive are not those that were sent, {number} times\n"
                    "  the object is damaged, or the way to it: see which with roadmill store fsck", error.sha256)
            except (BaseError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # this machine's, such as a full disk
                    raise
                found = read_trouble(str(error))
                trouble = found.error(self.where, name)
                if not found.temporary or re.search(r", after \d+ retries", str(error)):  # the client's own
                    break
        raise trouble from None

    @cached_property
    def _store(self) -> S3Store:
        return self._connect(self.patience.stalled_s, self.patience.retries)

    @cached_property
    def _sending(self) -> S3Store:
        return self._connect(self.patience.sending_s, self.patience.retries)

    @cached_property
    def _sending_once(self) -> S3Store:
        """For what means something else when it is repeated."""
        return self._connect(self.patience.sending_s, 0)

    def _connect(self, stalled_s: float, retries: int) -> S3Store:
        patience = self.patience
        try:
            credentials = Boto3CredentialProvider(self._session(), ttl=CREDENTIALS_LIVE)
        except (ValueError, botocore.exceptions.BotoCoreError):
            raise RemoteError(f"{self.where}: AWS's credential chain gives no credentials\n  {CREDENTIALS}") from None
        settings = {"endpoint": self._endpoint, "region": self._region, "server_side_encryption": self.sse,
                    "sse_kms_key_id": self._sse_kms_key}
        return S3Store(
            self.bucket, prefix=self.prefix or None, credential_provider=credentials,
            config={"checksum_algorithm": "SHA256", **{name: value for name, value in settings.items() if value}},
            client_options={"allow_http": (self._endpoint or "").startswith("http://"),
                            "connect_timeout": timedelta(seconds=patience.connect_s),
                            "read_timeout": timedelta(seconds=stalled_s), "timeout": timedelta(days=1)},
            retry_config={"max_retries": retries, "retry_timeout": timedelta(seconds=patience.give_up_s),
                          "backoff": {"init_backoff": timedelta(seconds=patience.first_wait_s), "base": 2,
                                      "max_backoff": timedelta(seconds=patience.longest_wait_s)}})

    @property
    def encryption(self) -> dict[str, str]:
        """What boto3 is to be told of encryption when an object is made."""
        said = {"ServerSideEncryption": self.sse, "SSEKMSKeyId": self._sse_kms_key}
        return {name: value for name, value in said.items() if value}

    def client(self) -> Any:
        """boto3's client for the same server with the same credentials, for what obstore lacks."""
        patience = self.patience
        config = botocore.config.Config(
            connect_timeout=patience.connect_s, read_timeout=patience.stalled_s, max_pool_connections=16,
            retries={"total_max_attempts": patience.retries + 1, "mode": "standard"},
            request_checksum_calculation="when_required", response_checksum_validation="when_required")
        return self._session().client("s3", endpoint_url=self._endpoint, config=config)

    def _session(self) -> boto3.Session:
        try:
            return boto3.Session(profile_name=self._profile, region_name=self._region)
        except botocore.exceptions.ProfileNotFound:
            raise ConfigError(f"there is no AWS profile named {self._profile}\n"
                              "  set store.profile to one of: aws configure list-profiles") from None


def etag_of(sums: list[Any], many: bool = False) -> str:
    """The ETag that S3 gives to an object of one part, or of many, from their MD5s."""
    if many:
        return f"{hashlib.md5(b''.join(part.digest() for part in sums)).hexdigest()}-{len(sums)}"
    return (sums[0] if sums else hashlib.md5(b"")).hexdigest()


def _while_alike(page: Callable[[str], list[Listed]], prefix: str) -> Iterator[Listed]:
    """The objects of the pages that begin at the prefix, as long as they start with it."""
    after: str | None = f"{prefix[:-1]}{chr(ord(prefix[-1]) - 1)}zz"  # hardly a name comes between it and the prefix
    while after:
        found = page(after)
        alike = [one for one in found if one.name.startswith(prefix)]
        yield from alike
        after = found[-1].name if len(found) == len(alike) == PAGE else None


def _compare(got: obstore.GetResult, sha256: str, num_bytes: int) -> None:
    """Raises DifferentBytesError where the bytes that came are not those that the answer announced."""
    if num_bytes != got.meta["size"] or got.attributes.get("sha256") not in (None, sha256):
        raise DifferentBytesError(got.meta["path"], sha256)
