"""An S3 server of one bucket on the loopback, made for a million names: what a benchmark's client pays is its own.

    python -m tests.benchmarks.stub_s3 PORT FOLDER

Objects are files under FOLDER; FOLDER.names lists names, sorted, of empty objects beside them. It knows no user and
checks nothing. GET /-/requests tells how many requests of each kind came since it was asked last.
"""

import hashlib
import json
import sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

AGED = "2026-01-01T00:00:00.000Z"
EMPTY = '"d41d8cd98f00b204e9800998ecf8427e"'


class Handler(BaseHTTPRequestHandler):
    """GET, HEAD, PUT and ListObjectsV2."""

    protocol_version = "HTTP/1.1"
    folder: Path
    empty: list[str]
    requests: ClassVar[Counter] = Counter()

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Sends it."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """An object, a page of a listing, or the counts."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path == "/-/requests":
            body = json.dumps(self.requests).encode()
            self.requests.clear()
            return self.answer(200, body)
        if query.get("list-type") == "2":
            self.requests["LIST"] += 1
            return self.answer(200, self.page(query), Content_Type="application/xml")
        self.requests["HEAD" if self.command == "HEAD" else "GET"] += 1
        path = self.object(url.path)
        if not path.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        data = path.read_bytes()
        return self.answer(200, data, ETag=f'"{hashlib.md5(data).hexdigest()}"',
                           Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        """Keeps an object."""
        self.requests["PUT"] += 1
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.object(urlsplit(self.path).path)
        if self.headers.get("If-None-Match") and path.exists():
            return self.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if (name := path.relative_to(self.folder).as_posix()).startswith("ac/"):
            insort(self.empty, name)
        return self.answer(200, ETag=f'"{hashlib.md5(data).hexdigest()}"')

    def object(self, path: str) -> Path:
        """The file of /bucket/name."""
        return self.folder / unquote(path).split("/", 2)[2]

    def page(self, query: dict[str, str]) -> bytes:
        """The names that a page of a listing has."""
        prefix, after = query.get("prefix", ""), query.get("continuation-token") or query.get("start-after", "")
        names = self.empty
        if not prefix.startswith("ac/"):
            names = sorted(path.relative_to(self.folder).as_posix() for path in (self.folder / prefix).rglob("*")
                           if path.is_file())
        first = max(bisect_left(names, prefix), bisect_right(names, after))
        found = names[first:first + 1000]
        while found and not found[-1].startswith(prefix):
            found.pop()
        more = len(found) == 1000 and first + 1000 < len(names) and names[first + 1000].startswith(prefix)
        rows = "".join(f"<Contents><Key>{name}</Key><LastModified>{AGED}</LastModified><ETag>{EMPTY}</ETag>"
                       "<Size>0</Size><StorageClass>STANDARD</StorageClass></Contents>" for name in found)
        token = f"<NextContinuationToken>{found[-1]}</NextContinuationToken>" if more else ""
        return (f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><IsTruncated>{str(more).lower()}'
                f"</IsTruncated>{token}<KeyCount>{len(found)}</KeyCount>{rows}</ListBucketResult>").encode()


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[2])
    Handler.empty = Path(f"{sys.argv[2]}.names").read_text().splitlines()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
