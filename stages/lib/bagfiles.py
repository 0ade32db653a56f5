"""What is wrong with a recording's files as such, in words that lead out; rosbags' own are of no help there."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path, PurePosixPath

import yaml

from stages.lib.errors import DataError

MAGIC = {".mcap": b"\x89MCAP0\r\n", ".db3": b"SQLite format 3\0", ".bag": b"#ROSBAG V2.0\n"}
RESCUE = {".mcap": "`mcap recover IN.mcap -o OUT.mcap` saves what is readable",
          ".db3": "`sqlite3 IN.db3 .recover | sqlite3 OUT.db3` saves what is readable",
          ".bag": "`rosbag reindex FILE` saves what is readable"}


def check(path: Path, name: str) -> None:
    """Names what is wrong with the files as such; rosbags' own words for these are of no help."""
    if not path.exists():
        raise DataError(f"{name}: there is no such recording; bring it back, or run `roadmill scan` on what is there")
    if not path.is_dir():
        if path.suffix not in MAGIC:
            raise DataError(f"{name}: is not a recording; expected an .mcap, .db3 or .bag file, or a rosbag2 folder "
                            "with metadata.yaml; `roadmill scan` lists what it takes")
        return _check_file(path, str(PurePosixPath(name).with_name(path.name)))
    members = _members(path, name)
    missing = [member for member in members if not (path / member).exists()]
    if missing:
        raise DataError(f"{name}: metadata.yaml names {len(members)} file(s), {len(missing)} of them missing, first "
                        f"{missing[0]}; copy them here, or go on without: `ros2 bag reindex FOLDER`")
    for member in members:
        if not (path / member).is_file():
            raise DataError(f"{name}: metadata.yaml names {member!r}, which is no file; "
                            "write it anew: `ros2 bag reindex FOLDER`")
        _check_file(path / member, f"{name}/{member}")


def _members(folder: Path, name: str) -> list[str]:
    """File names that metadata.yaml lists. Raises DataError for what rosbags would refuse with fewer words."""
    reindex = "write it anew: `ros2 bag reindex FOLDER`"
    try:
        text = (folder / "metadata.yaml").read_text()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.CSafeLoader)):
            raise yaml.YAMLError("it uses aliases, which recorders do not")
        metadata = yaml.load(text, yaml.CSafeLoader)["rosbag2_bagfile_information"]
        members = [PurePosixPath(member).name for member in metadata["relative_file_paths"]]
        storage = metadata["storage_identifier"]
        encodings = {row["topic_metadata"]["name"]: row["topic_metadata"]["serialization_format"]
                     for row in metadata["topics_with_message_count"]}
    except FileNotFoundError:
        raise DataError(f"{name}: is a folder without metadata.yaml; write one with `ros2 bag reindex FOLDER`, or "
                        "scan its files one by one") from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{name}/metadata.yaml: can't be read: {reason(error)}; {reindex}") from None
    if storage not in ("mcap", "sqlite3"):
        raise DataError(f"{name}/metadata.yaml: storage_identifier is {storage!r}, expected 'mcap' or 'sqlite3'; "
                        f"{reindex}")
    for topic, encoding in sorted(encodings.items()):
        if encoding != "cdr":
            raise DataError(f"{name}/metadata.yaml: serialization_format of {topic} is {encoding!r}, expected 'cdr'; "
                            "correct it there if only that is wrong, or rewrite all with `ros2 bag convert`")
    return members


def _check_file(file: Path, name: str) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(128)
        stream.seek(max(0, size - 8))
        tail = stream.read()
    magic = MAGIC.get(file.suffix)
    if size == 0:
        raise DataError(f"{name}: is empty (0 bytes); copy it again and run `roadmill scan`")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{name}: is a Git-LFS pointer of {size} bytes, not the recording; fetch that: `git lfs pull`")
    if magic and not head.startswith(magic):
        raise DataError(f"{name}: does not begin as a {file.suffix} file does ({head[:13]!r}); copy it again, or leave "
                        "it out of the folder that `roadmill scan` reads")
    if file.suffix == ".db3":
        _check_tables(file, name)
    if file.suffix == ".mcap" and tail != magic:
        raise DataError(f"{name}: ends early, at byte {size} without the MCAP end mark (a broken copy, or a recorder "
                        f"that was cut off); copy it again, or {RESCUE['.mcap']}")


def _check_tables(file: Path, name: str) -> None:
    """A view or a virtual table may give any number of rows; a name with ? or % would open another file."""
    if any(sign in str(file) for sign in "?#%"):
        raise DataError(f"{name}: a .db3 file's path must be without ?, # and %; rename it and run `roadmill scan`")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro&immutable=1", uri=True)) as database:
            other = database.execute("SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE "
                                     "'CREATE VIRTUAL%' OR sql LIKE '%GENERATED ALWAYS%'").fetchone()
    except sqlite3.Error as error:
        raise DataError(f"{name}: damaged: {reason(error)}; {rescue(file)}") from None
    if other:
        raise DataError(f"{name}: {str(other[0])[:80]!r} in it is no plain table, and a recording has those alone; "
                        "copy it again")


def reason(error: Exception) -> str:
    """One line of what a library said."""
    words = " ".join(str(error).split()).removesuffix("; please report issue.").rstrip(".")
    kind = type(error).__name__
    return words[:120] if kind in ("ReaderError", "SerdeError") and words else f"{kind} {words[:120]}".rstrip()


def rescue(path: Path) -> str:
    if path.is_dir():
        return "copy it again, or write metadata.yaml anew: `ros2 bag reindex FOLDER`"
    return f"copy it again, or {RESCUE[path.suffix]}"
