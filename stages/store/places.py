"""The store that a site describes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.errors import ConfigError
from stages.lib.site import BucketStore, FolderStore
from stages.store.folder import Folder
from stages.store.store import Store

if TYPE_CHECKING:
    from stages.store.bucket import Bucket

BUCKET_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]+(/(?!\.{1,2}(/|$))[\w.~-]+)*/?", re.ASCII)


def open_store(store: FolderStore | BucketStore, root: Path,
               rebuild: Callable[[str], bool] = lambda digest: False) -> Store:
    """The store, with relative folders taken against `root`; nothing is read or written yet."""
    if isinstance(store, FolderStore):
        return Store.in_folder(root / store.root, rebuild)
    from stages.store.bucket import Bucket

    bucket = Bucket(store.url, endpoint=store.endpoint, region=store.region, profile=store.profile,
                    sse=store.sse, sse_kms_key=store.sse_kms_key)
    return Store(Folder(root / store.cache), bucket, store.cache_gib * 2**30, rebuild)


def open_bucket(url: str, store: FolderStore | BucketStore) -> Bucket:
    """The bucket at s3://bucket/prefix, on the server of the site's store, or AWS's where that is a folder.

    Raises ConfigError for what is no such URL.
    """
    if not BUCKET_URL.fullmatch(url):
        raise ConfigError(f"{url!r} is not s3://bucket/prefix\n"
                          "  its parts are of letters, digits and ._~-, as in s3://bucket/drives/car_7")
    from stages.store.bucket import Bucket

    if isinstance(store, FolderStore):
        return Bucket(url)
    return Bucket(url, endpoint=store.endpoint, region=store.region, profile=store.profile,
                  sse=store.sse, sse_kms_key=store.sse_kms_key)
