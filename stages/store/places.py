"""The store that a site describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages.lib.site import BucketStore, FolderStore
from stages.store.folder import Folder
from stages.store.store import Store


def open_store(store: FolderStore | BucketStore, root: Path,
               rebuild: Callable[[str], bool] = lambda digest: False) -> Store:
    """The store, with relative folders taken against `root`; nothing is read or written yet."""
    if isinstance(store, FolderStore):
        return Store.in_folder(root / store.root, rebuild)
    from stages.store.bucket import Bucket

    bucket = Bucket(store.url, endpoint=store.endpoint, region=store.region, profile=store.profile,
                    sse=store.sse, sse_kms_key=store.sse_kms_key)
    return Store(Folder(root / store.cache), bucket, store.cache_gib * 2**30, rebuild)
