"""A large file into a bucket, part by part: when it was cut off, it goes on with the parts that the bucket has.

Which upload it was is noted on this machine, with the sha256 of the file, so that parts of other bytes never meet; the
parts that the bucket names are compared with the file's own, by their MD5 and size. The object appears when all parts
are there and the bytes read for them have the file's sha256. Parts of an upload that never goes on cost money until a
lifecycle rule of the bucket removes them (AbortIncompleteMultipartUpload).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

from stages.lib.digests import digest_bytes
from stages.lib.errors import DataError, RemoteError, TemporaryRemoteError
from stages.store.bucket import MAX_PARTS, Bucket, etag_of
from stages.store.bucket_errors import CREDENTIALS, read_trouble

PART_BYTES = 16 << 20
PARTS_IN_FLIGHT = 4


def send(bucket: Bucket, name: str, path: Path, sha256: str, *, notes: Path,
         advance: Callable[[int], None]) -> None:
    """Keeps a copy of the file, whose sha256 this is, as the object `name`; whole and verified, or not at all.

    notes    folder of this machine where unfinished uploads are noted
    advance  advance(num_bytes) is told of each part; what it raises ends the upload, to go on later
    Raises DataError where the file changes meanwhile, and RemoteError.
    """
    size = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
    wanted = {"sha256": sha256, "part_bytes": part_bytes}
    note = notes / f"{digest_bytes(f'{bucket.where}/{name}'.encode())[:32]}.json"
    with _our_errors(bucket, name):
        upload = _Upload(bucket, name)
        there = upload.go_on(note, wanted)
        if there is None:
            there = {}
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps({"id": upload.begin(sha256), **wanted}))
        sums, found = upload.send_parts(path, part_bytes, there, advance)
        if found != sha256:
            upload.abort()
            raise DataError(f"{path} changed while it was being sent\n  run it again when nothing writes to it")
        etag = upload.complete(len(sums))
    if not bucket.is_stored(name, etag, etag_of(sums, True), sha256, size):
        bucket.delete([name])
        raise RemoteError(f"{bucket.where}/{name}: what the bucket made of the parts is not what was sent; removed\n"
                          "  run it again")
    note.unlink()


class _Upload:
    """One multipart upload."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._client = bucket.client()
        self._encryption = bucket.encryption
        self._place = {"Bucket": bucket.bucket, "Key": f"{bucket.prefix}/{name}".lstrip("/")}
        self._etags: dict[int, str] = {}

    def begin(self, sha256: str) -> str:
        self._place["UploadId"] = self._client.create_multipart_upload(**self._place, **self._encryption,
                                                                       Metadata={"sha256": sha256})["UploadId"]
        return self._place["UploadId"]

    def go_on(self, note: Path, wanted: dict[str, Any]) -> dict[int, tuple[str, int]] | None:
        """Part number -> (ETag, bytes) of what the bucket has of the upload that is noted; None where there is none.

        One of other bytes is ended.
        """
        try:
            noted = json.loads(note.read_text())
            upload = noted.pop("id")
        except (FileNotFoundError, ValueError, KeyError):
            return None
        place = {**self._place, "UploadId": upload}
        gone = self._client.exceptions
        with contextlib.suppress(gone.NoSuchUpload, gone.NoSuchKey):  # the second is radosgw's word
            if noted != wanted:
                self._client.abort_multipart_upload(**place)
                return None
            there = {part["PartNumber"]: (part["ETag"].strip('"'), part["Size"])
                     for page in self._client.get_paginator("list_parts").paginate(**place)
                     for part in page.get("Parts", ())}
            self._place = place
            return there
        return None

    def send_parts(self, path: Path, part_bytes: int, there: dict[int, tuple[str, int]],
                   advance: Callable[[int], None]) -> tuple[list[Any], str]:
        """Sends the parts that are not there: the MD5 of every part, and the sha256 of all that was read."""
        whole, sums, sending = hashlib.sha256(), [], deque()
        with path.open("rb") as file, ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
            while data := file.read(part_bytes):
                whole.update(data)
                sums.append(hashlib.md5(data))
                if there.get(len(sums)) == (sums[-1].hexdigest(), len(data)):
                    self._etags[len(sums)] = sums[-1].hexdigest()
                else:
                    sending.append(pool.submit(self._send_part, len(sums), data, sums[-1].digest()))
                    if len(sending) == PARTS_IN_FLIGHT:
                        sending.popleft().result()
                advance(len(data))
            for one in sending:
                one.result()
        return sums, whole.hexdigest()

    def _send_part(self, number: int, data: bytes, md5: bytes) -> None:
        self._etags[number] = self._client.upload_part(**self._place, PartNumber=number, Body=data,
                                                       ContentMD5=base64.b64encode(md5).decode())["ETag"]

    def complete(self, num_parts: int) -> str:
        """The ETag of the object that the parts are now."""
        parts = [{"PartNumber": number, "ETag": self._etags[number]} for number in range(1, num_parts + 1)]
        try:
            return self._client.complete_multipart_upload(**self._place, MultipartUpload={"Parts": parts})["ETag"]
        except self._client.exceptions.NoSuchUpload:  # it is done, and the answer was lost: the object itself will tell
            return ""

    def abort(self) -> None:
        self._client.abort_multipart_upload(**self._place)


@contextmanager
def _our_errors(bucket: Bucket, name: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        said = error.response
        text = f"(code: {said['Error'].get('Code')}) status: {said['ResponseMetadata'].get('HTTPStatusCode', 0)}"
        raise read_trouble(text).error(bucket.where, name) from None
    except HTTPClientError as error:
        raise TemporaryRemoteError(f"{bucket.where}/{name}: the connection broke ({type(error).__name__})\n"
                                   "  run it again: it goes on with the parts that are there") from None
    except BotoCoreError as error:
        raise RemoteError(f"{bucket.where}/{name}: {type(error).__name__}\n  {CREDENTIALS}") from None
