"""Messages of a recording, as raw bytes with their stamps: rosbag2 (MCAP, sqlite3) and ROS 1 bags.

The one door to `rosbags`. What that library raises on a damaged recording (ReaderError, OSError, UnicodeDecodeError,
struct.error, KeyError, …) leaves here as DataError. What a disk or an account does (EIO, EACCES, …) is passed on: it is
not the recording's fault.

Nanoseconds become microseconds here, on integers, by dropping the last three digits.
"""

from __future__ import annotations

import errno
import heapq
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from rosbags.interfaces import Connection, MessageDefinitionFormat, Nodetype
from rosbags.interfaces.typing import RPath
from rosbags.rosbag1 import Reader as Rosbag1
from rosbags.rosbag1 import reader as rosbag1_reader
from rosbags.rosbag2 import Reader as Rosbag2
from rosbags.rosbag2 import reader as rosbag2_reader
from rosbags.rosbag2 import storage_mcap
from rosbags.rosbag2.reader import DirectoryReader
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from stages.lib import inflate
from stages.lib.bagfiles import check, reason, rescue
from stages.lib.errors import DataError, RoadmillError
from stages.lib.knobs import near_miss
from stages.lib.msgdefs import KNOWN

storage_mcap.DECOMPRESSORS.update(zstd=inflate.zstd, lz4=inflate.lz4)
rosbag1_reader.decompressors.update(bz2=inflate.bz2, lz4=inflate.lz4)
rosbag2_reader.zstd = inflate

MACHINE_ERRORS = {errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOSPC,
                  errno.ENOMEM}
MAX_ARRAY = 1024  # no type of ROS's own has more than 36
HEADER, TIME = "std_msgs/msg/Header", "builtin_interfaces/msg/Time"


@dataclass(frozen=True)
class Topic:
    """A topic of the recording, and how many messages its index counts (0 for a declared but empty one)."""

    name: str
    msgtype: str
    count: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message as recorded. seq: its ordinal among the messages of its topic with this same receive_ns."""

    topic: str
    msgtype: str
    receive_ns: int
    seq: int
    data: bytes


def ns_to_us(stamp_ns: int) -> int:
    """Microseconds since the epoch; the last three digits are dropped."""
    return stamp_ns // 1000


def stamp_us(header: Any) -> int:
    """The sensor time of a decoded std_msgs/Header [µs]."""
    return header.stamp.sec * 1_000_000 + header.stamp.nanosec // 1000


class Bag:
    """An open recording. Made by `open_bag`; one `messages` iteration at a time."""

    def __init__(self, reader: Rosbag1 | Rosbag2, path: RPath, name: str) -> None:
        self.name = name
        self._reader = reader
        self._path = path
        self._is_ros1 = isinstance(reader, Rosbag1)
        self._folder = reader.storage if isinstance(getattr(reader, "storage", None), DirectoryReader) else None
        self._stores: dict[str, Typestore] = {}
        self._stamp_layouts: dict[str, tuple[int, str, str] | None] = {}
        self.topics: dict[str, Topic] = self._list_topics()

    def messages(self, topics: Iterable[str], start_ns: int | None = None, stop_ns: int | None = None
                 ) -> Iterator[Message]:
        """Messages with start_ns <= receive time < stop_ns of some topics, in receive order.

        Chunks of an MCAP file or ROS 1 bag that hold none of these topics or times are neither read nor decompressed
        (an MCAP file without a summary section is scanned from its start); sqlite3 goes by its time index.
        Raises DataError for an unknown topic, a damaged chunk, and, where no window is asked for, when fewer messages
        can be read than the index counts.
        """
        wanted = set(topics)
        for topic in sorted(wanted - self.topics.keys()):
            raise DataError(f"{self.name}: has no topic {topic}{near_miss(topic, self.topics)}; topics: "
                            f"{', '.join(sorted(self.topics)) or 'none'}; name another one in the rig")
        last: dict[str, tuple[int, int]] = {}
        num_read = dict.fromkeys(wanted, 0)
        source, receive_ns = self._source(wanted, start_ns, stop_ns), None
        while True:
            try:
                connection, receive_ns, data = next(source)
            except StopIteration:
                break
            except Exception as error:
                before = "its first message" if receive_ns is None else f"the message after {ns_to_us(receive_ns)} us"
                of = ", ".join(sorted(wanted)) if len(wanted) < 4 else f"{len(wanted)} topics"
                raise _damage(error, self._path, self.name, f"{before} of {of}") from None
            last_ns, last_seq = last.get(connection.topic, (None, 0))
            seq = last_seq + 1 if last_ns == receive_ns else 0
            last[connection.topic] = (receive_ns, seq)
            num_read[connection.topic] += 1
            yield Message(connection.topic, self.topics[connection.topic].msgtype, receive_ns, seq, data)
        if start_ns is None and stop_ns is None:
            self._check_all_read(num_read)

    def decode(self, message: Message) -> Any:
        """The message as rosbags' dataclass: field names as in ROS, arrays as numpy. Raises DataError."""
        store = self._typestore(message.msgtype)
        data = memoryview(message.data)  # of bytes, rosbags would copy all but the first four
        try:
            if self._is_ros1:
                return store.deserialize_ros1(data, message.msgtype)
            return store.deserialize_cdr(data, message.msgtype)
        except Exception as error:
            raise _damage(error, self._path, self.name, _place(message)) from None

    def sensor_us(self, message: Message) -> int | None:
        """Its header.stamp (or leading stamp) [µs], read from its first bytes; None where the type has none or it is 0.

        Layout: CDR is 4 bytes of encapsulation, then int32 sec, uint32 nanosec (OMG DDS-XTypes 1.3, 7.4.1);
        ROS 1 is uint32 seq, then uint32 secs, uint32 nsecs (wiki.ros.org/msg). Raises DataError.
        """
        if message.msgtype not in self._stamp_layouts:
            self._stamp_layouts[message.msgtype] = self._stamp_layout(message.msgtype)
        layout = self._stamp_layouts[message.msgtype]
        if layout is None:
            return None
        offset, little, big = layout
        data = message.data
        if len(data) < offset + 8 or (not self._is_ros1 and bytes(data[:2]) not in (b"\0\0", b"\0\1")):
            raise DataError(f"{self.name}: {_place(message)} is damaged: {len(data)} bytes that do not begin with a "
                            f"header; {rescue(self._path)}")
        sec, nanosec = struct.unpack_from(little if self._is_ros1 or data[1] else big, data, offset)
        return sec * 1_000_000 + nanosec // 1000 if sec or nanosec else None

    def shown_us(self, message: Message) -> int:
        """A time [µs] that grows with the order of display of a video's pictures: sensor_us, else when it came."""
        return self.sensor_us(message) or ns_to_us(message.receive_ns)

    def _list_topics(self) -> dict[str, Topic]:
        counts: dict[str, int] = {}
        types: dict[str, set[str]] = {}
        stored = [c for s in self._folder.storages for c in s.connections] if self._folder else []
        for connection in [*self._reader.connections, *stored]:
            types.setdefault(connection.topic, set()).add(_full(connection.msgtype))
            counts.setdefault(connection.topic, 0)
        for connection in stored if self._folder else self._reader.connections:
            counts[connection.topic] += connection.msgcount
        for topic, several in types.items():
            if len(several) > 1:
                raise DataError(f"{self.name}: topic {topic} carries several types ({', '.join(sorted(several))}); "
                                f"keep one of them with `ros2 bag convert`")
        return {name: Topic(name, min(types[name]), counts[name]) for name in sorted(types)}

    def _source(self, wanted: set[str], start_ns: int | None, stop_ns: int | None
                ) -> Iterator[tuple[Connection, int, bytes]]:
        connections = [c for c in self._reader.connections if c.topic in wanted]
        for connection in connections:
            encoding = getattr(connection.ext, "serialization_format", "cdr")
            if encoding != "cdr":
                raise DataError(f"{self.name}: topic {connection.topic} is serialized as {encoding!r}, expected 'cdr'; "
                                "rewrite it with `ros2 bag convert`")
        if not connections:
            return iter(())
        if self._folder and len(self._folder.storages) > 1:
            parts = []
            for storage in self._folder.storages:
                part = copy(self._folder)
                part.storages = [storage]
                parts.append(part.messages(connections, start_ns, stop_ns))
            return heapq.merge(*parts, key=lambda row: row[1])
        return iter(self._reader.messages(connections, start_ns, stop_ns))

    def _check_all_read(self, num_read: dict[str, int]) -> None:
        for topic, num in sorted(num_read.items()):
            if num != self.topics[topic].count:
                raise DataError(f"{self.name}: the index counts {self.topics[topic].count} messages of {topic}, "
                                f"{num} can be read; {rescue(self._path)}")

    def _typestore(self, msgtype: str) -> Typestore:
        """A store with this type and what it is made of; types are parsed only when a message of them is wanted."""
        if msgtype not in self._stores:
            defined = [c.msgdef for c in self._reader.connections
                       if _full(c.msgtype) == msgtype and c.msgdef.format != MessageDefinitionFormat.NONE]
            try:
                store = _parsed(defined[0], msgtype) if defined else _known()
            except Exception as error:
                raise DataError(f"{self.name}: the definition of {msgtype} can't be read: {reason(error)}; "
                                "leave its topic out of the rig, or rewrite it with `ros2 bag convert`") from None
            if msgtype not in store.fielddefs:
                raise DataError(f"{self.name}: has no definition of {msgtype}; rewrite it as MCAP, which keeps "
                                "definitions, where that type is installed: `ros2 bag convert`")
            self._stores[msgtype] = store
        return self._stores[msgtype]

    def _stamp_layout(self, msgtype: str) -> tuple[int, str, str] | None:
        """(offset in bytes, little-endian and big-endian struct format) of the leading stamp."""
        _, fields = self._typestore(msgtype).fielddefs[msgtype]
        kind, first = fields[0][1] if fields else (None, None)
        if kind != Nodetype.NAME or first not in (HEADER, TIME):
            return None
        if self._is_ros1:
            return (4 if first == HEADER else 0, "<II", "<II")
        return 4, "<iI", ">iI"


@contextmanager
def open_bag(path: RPath, name: str | None = None) -> Iterator[Bag]:
    """An open recording: an .mcap, .db3 or .bag file, or a rosbag2 folder with its metadata.yaml.

    path  a pathlib.Path, or what reads like one
    name  what error texts call it (default: its file or folder name)
    Raises DataError for what is missing, empty, cut off, a Git-LFS pointer, or not a recording at all, and for a field
    that a message of the type must have and, by the recording's own definition, has not.
    """
    name = name or path.name
    check(path, name)
    try:
        reader = Rosbag1(path) if path.suffix == ".bag" else Rosbag2(path)
        reader.open()
    except Exception as error:
        raise _damage(error, path, name, "its index") from None
    try:
        yield Bag(reader, path, name)
    except AttributeError as error:
        if not hasattr(error.obj, "__msgtype__"):
            raise
        raise DataError(f"{name}: its {error.obj.__msgtype__} has no field {error.name!r}: that definition is damaged, "
                        f"or of another version; {rescue(path)}") from None
    finally:
        reader.close()


def _full(msgtype: str) -> str:
    """The ROS 2 name of a type: sensor_msgs/Image is sensor_msgs/msg/Image."""
    return msgtype.replace("/", "/msg/") if msgtype.count("/") == 1 else msgtype


def _parsed(definition: Any, msgtype: str) -> Typestore:
    """A type store of one message definition. IDL definitions of several types are parted by a line and `IDL: name`."""
    types: dict[str, Any] = {}
    if definition.format == MessageDefinitionFormat.MSG:
        types.update(get_types_from_msg(definition.data, msgtype))
    else:
        for part in definition.data.split("=" * 80 + "\n"):
            types.update(get_types_from_idl(part.split("\n", 1)[1] if part.startswith("IDL: ") else part))
    _check_lists({name: fields for name, (_, fields) in types.items()})
    store = get_typestore(Stores.EMPTY)
    store.register(types)
    return store


def _known() -> Typestore:
    """The types of ROS 2 Humble and those of msgdefs."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    for msgtype, text in KNOWN.items():
        store.register(get_types_from_msg(text, msgtype))
    return store


def _check_lists(types: dict[str, list]) -> None:
    """Raises ValueError for a list of messages that take no bytes, which a few bytes make as long as they like, and for
    a fixed array of more texts or messages than MAX_ARRAY, each of which becomes lines of rosbags' code.

    types  name -> (field, description) of each field, as rosbags parses them
    """
    def is_empty(name: str) -> bool:
        return name in types and all((kind == Nodetype.NAME and is_empty(of)) or (kind == Nodetype.ARRAY and (
            not of[1] or (of[0][0] == Nodetype.NAME and is_empty(of[0][1])))) for _, (kind, of) in types[name])

    for name, fields in types.items():
        for field, (kind, of) in fields:
            if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE):
                (member_kind, member), length = of
                plain = member_kind == Nodetype.BASE and "string" not in member[0]
                if kind == Nodetype.ARRAY and not plain and length > MAX_ARRAY:
                    raise ValueError(f"{name}.{field} has {length} members, at most {MAX_ARRAY} are read")
                if member_kind == Nodetype.NAME and is_empty(member):
                    raise ValueError(f"{name}.{field} is a list of {member}, which holds nothing")


def _damage(error: Exception, path: RPath, name: str, place: str) -> Exception:
    """The DataError for what rosbags raised, or the error itself where it is the machine's or our own."""
    if isinstance(error, RoadmillError) or (isinstance(error, OSError) and error.errno in MACHINE_ERRORS):
        return error
    return DataError(f"{name}: damaged at {place}: {reason(error).replace(str(path), name)}; {rescue(path)}")


def _place(message: Message) -> str:
    return f"{message.topic} ({message.msgtype}), received at {ns_to_us(message.receive_ns)} us"
