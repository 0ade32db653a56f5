"""Files that somebody made to do harm, and the readers that meet them, in a process that may not use much memory.

`python -m tests.hostile FOLDER` reads each and prints JSON: case -> what the reader ended with.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sqlite3
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lz4.frame
import numpy as np
import polars as pl
from backports import zstd

from stages.lib import bag, calibration, documents, images, openlabel, pack, pointcloud, recordings, tables
from stages.lib.calibration import CameraModel
from stages.lib.cameras import Rectifier
from stages.tools import view
from tests import tinybags

MEMORY_BYTES = 3 * 2**30  # of data a reader may ask for; the bombs hold or declare more
SEPARATOR = "=" * 80 + "\n"
CASES: dict[str, Callable[[Path], object]] = {}


def case(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Enters a function that makes a file at a path and reads it."""
    CASES[read.__name__] = read
    return read


# packs ----------------------------------------------------------------------------------------------------------------
def tar_of(path: Path, *members: tarfile.TarInfo | str) -> Path:
    """A tar of these members, with a byte in each plain one."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            member = tarfile.TarInfo(member) if isinstance(member, str) else member
            member.size = 1 if member.isreg() else 0
            tar.addfile(member, io.BytesIO(b"x"))
    return path


def link(name: str, kind: bytes, to: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


MEMBERS = {
    "up": ["../up"], "up_later": ["samples/../../up"], "absolute": ["/tmp/roadmill-hostile"], "dot": ["./samples/a"],
    "twice": ["samples/a", "samples/a"], "symlink": [link("samples", tarfile.SYMTYPE, "/tmp"), "samples/a"],
    "hardlink": [link("samples/a", tarfile.LNKTYPE, "/etc/passwd")], "fifo": [link("a", tarfile.FIFOTYPE, "")],
    "folder": [link("samples", tarfile.DIRTYPE, "")], "file_as_folder": ["samples", "samples/a"],
    "newline": ["samples/a\nb"], "long": ["samples/" + "a" * 2000]}
for label, members in MEMBERS.items():
    CASES[f"pack_{label}"] = lambda path, members=members: pack.extract(tar_of(path, *members), path.parent / "out")


@case
def pack_sparse(path: Path) -> object:
    """A GNU sparse member of 1 TiB in one block."""
    member = tarfile.TarInfo("samples/a")
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[156:157] = b"S"
    head[386:410] = b"%011o\0%011o\0" % (0, 0)
    head[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    path.write_bytes(head + bytes(1024))
    return pack.extract(path, path.parent / "out")


@case
def pack_member_past_the_end(path: Path) -> object:
    member = tarfile.TarInfo("samples/a")
    member.size = 2**40
    path.write_bytes(member.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    return pack.extract(path, path.parent / "out")


@case
def pack_header_past_the_end(path: Path) -> object:
    member = tarfile.TarInfo("a")
    member.type, member.size = tarfile.XHDTYPE, 2**62
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    return pack.extract(path, path.parent / "out")


@case
def pack_read_of_any_length(path: Path) -> object:
    path.write_bytes(bytes(1024))
    return pack.read_member(path, 0, 2**50)


@case
def pack_read_before_the_begin(path: Path) -> object:
    path.write_bytes(bytes(1024))
    return pack.read_member(path, 512, -1)


# tables and documents -------------------------------------------------------------------------------------------------
@case
def table_list_of_one_number(path: Path) -> object:
    pl.DataFrame({"a": [np.zeros(2**25)]}).write_parquet(path, compression="zstd")
    assert path.stat().st_size < 20_000
    return tables.read(path)


@case
def table_of_one_row_again_and_again(path: Path) -> object:
    pl.DataFrame({"a": pl.zeros(2 * 10**7, eager=True)}).write_parquet(path, compression="zstd")
    return tables.scan(path).collect()


@case
def table_without_footer(path: Path) -> object:
    path.write_bytes(b"PAR1" + b"\xff" * 40 + struct.pack("<I", 2**31) + b"PAR1")
    return tables.read(path)


@case
def table_footer_of_lists_in_lists(path: Path) -> object:
    footer = b"\x49" + b"\x19" * 100_000
    path.write_bytes(b"PAR1" + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return tables.read(path)


@case
def json_deep(path: Path) -> object:
    path.write_bytes(b"[" * 10**6)
    return openlabel.read(path)


@case
def json_long(path: Path) -> object:
    with path.open("wb") as file:
        file.truncate(documents.MAX_BYTES + 1)
    return calibration.read(path)


@case
def listing_leads_out(path: Path) -> object:
    path.write_text(json.dumps({"name": "../../a", "bytes": 1, "digest": "0" * 64, "rig": "sim", "members": []}))
    return recordings.read_listing(path)


@case
def listing_member_leads_out(path: Path) -> object:
    path.write_text(json.dumps({"name": "a", "bytes": 1, "digest": "0" * 64, "rig": "sim",
                                "members": [["/etc/passwd", 1, "0" * 64]]}))
    return recordings.read_listing(path)


# pictures, points, cameras --------------------------------------------------------------------------------------------
def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(10**6), 9)
    return images.PNG + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    small = bytearray(images.encode_jpeg(np.zeros((8, 8, 3), np.uint8), 90))
    at = small.index(b"\xff\xc0")
    small[at + 5:at + 9] = struct.pack(">HH", height, width)
    return bytes(small)


@case
def png_of_60000_squared(path: Path) -> object:
    return images.decode(png(60_000, 60_000))


@case
def jpeg_of_65535_squared(path: Path) -> object:
    return images.decode(jpeg(65_535, 65_535))


@case
def jpeg_without_size(path: Path) -> object:
    return images.decode(images.JPEG + b"\xe0\0\2" * 10)


@case
def raw_image_without_width(path: Path) -> object:
    return images.from_message(SimpleNamespace(encoding="rgb8", height=2**32 - 1, width=0, step=0,
                                               data=np.zeros(0, np.uint8)))


@case
def raw_image_declared_large(path: Path) -> object:
    return images.from_message(SimpleNamespace(encoding="rgb8", height=2**16, width=2**16, step=3 * 2**16,
                                               data=np.zeros(8, np.uint8)))


@case
def cloud_declared_large(path: Path) -> object:
    field = [SimpleNamespace(name=name, offset=4 * n, datatype=7, count=1) for n, name in enumerate("xyz")]
    return pointcloud.decode(SimpleNamespace(height=2**31, width=2**31, point_step=12, row_step=0, fields=field,
                                             is_bigendian=False, data=np.zeros(0, np.uint8)), 0)


@case
def cloud_of_points_without_bytes(path: Path) -> object:
    return pointcloud.decode(SimpleNamespace(height=2**31, width=2**31, point_step=0, row_step=0, fields=[],
                                             is_bigendian=False, data=np.zeros(0, np.uint8)), 0)


@case
def camera_of_60000_squared(path: Path) -> object:
    return Rectifier(CameraModel("plumb_bob", 60_000, 60_000, np.eye(3), np.full(5, 0.1)), True, None)


# recordings -----------------------------------------------------------------------------------------------------------
def record(op: int, content: bytes) -> bytes:
    return struct.pack("<BQ", op, len(content)) + content


def text(content: str) -> bytes:
    return struct.pack("<I", len(content)) + content.encode()


def mcap(path: Path, compression: str, chunk: bytes, declared: int) -> Path:
    """An MCAP file of one chunk, without summary: it is scanned. mcap.dev/spec."""
    head = struct.pack("<QQQI", 0, 1, declared, 0) + text(compression) + struct.pack("<Q", len(chunk)) + chunk
    magic = b"\x89MCAP0\r\n"
    path.write_bytes(magic + record(1, text("ros2") + text("")) + record(6, head) + record(15, bytes(4))
                     + record(2, bytes(20)) + magic)
    return path


def zeros(compressor, num_mib: int) -> bytes:
    piece = bytes(2**20)
    return b"".join([*(compressor.compress(piece) for _ in range(num_mib)), compressor.flush()])


def opened(path: Path, topics: tuple[str, ...] = ("/x",)) -> object:
    with bag.open_bag(path) as recording:
        return [recording.decode(message) for message in recording.messages(topics)]


@case
def mcap_chunk_declares_a_terabyte(path: Path) -> object:
    return opened(mcap(path.with_suffix(".mcap"), "zstd", zstd.compress(b"x"), 2**40))


@case
def mcap_zstd_holds_more_than_declared(path: Path) -> object:
    return opened(mcap(path.with_suffix(".mcap"), "zstd", zeros(zstd.ZstdCompressor(), 5000), 100))


@case
def mcap_zstd_of_many_frames(path: Path) -> object:
    return opened(mcap(path.with_suffix(".mcap"), "zstd", 100 * zeros(zstd.ZstdCompressor(), 64), 2**26))


@case
def mcap_lz4_holds_more_than_declared(path: Path) -> object:
    compressor = lz4.frame.LZ4FrameCompressor()
    return opened(mcap(path.with_suffix(".mcap"), "lz4", compressor.begin() + zeros(compressor, 4000), 100))


@case
def mcap_record_declares_an_exabyte(path: Path) -> object:
    magic = b"\x89MCAP0\r\n"
    path = path.with_suffix(".mcap")
    path.write_bytes(magic + record(1, text("ros2") + text("")) + struct.pack("<BQ", 3, 2**60) + record(2, bytes(20))
                     + magic)
    return opened(path)


def ros1(path: Path, definition: str, data: bytes) -> object:
    """A ROS 1 bag of one message of a type of its own."""
    path = path.with_suffix(".bag")
    with tinybags.Rosbag1Writer(path) as writer:
        connection = writer.add_connection("/x", "a/msg/A", msgdef=definition, md5sum="0" * 32)
        writer.write(connection, 1, data)
    return opened(path)


@case
def ros1_list_of_messages_without_bytes(path: Path) -> object:
    return ros1(path, f"Empty[] xs\n{SEPARATOR}MSG: a/Empty\n", struct.pack("<I", 2**31))


@case
def ros1_list_of_nested_messages_without_bytes(path: Path) -> object:
    return ros1(path, f"B[] xs\n{SEPARATOR}MSG: a/B\nEmpty e\nuint8[0] n\n{SEPARATOR}MSG: a/Empty\n",
                struct.pack("<I", 2**31))


@case
def ros1_fixed_array_of_many_texts(path: Path) -> object:
    return ros1(path, "string[1000000000] xs\n", b"")


@case
def ros1_list_declared_long(path: Path) -> object:
    return ros1(path, "float64[] xs\n", struct.pack("<I", 2**32 - 1))


@case
def ros1_text_declared_long(path: Path) -> object:
    return ros1(path, "string xs\n", struct.pack("<I", 2**32 - 1))


@case
def ros1_type_within_itself(path: Path) -> object:
    return ros1(path, "A a\n", b"")


@case
def ros1_constant_of_code(path: Path) -> object:
    victim = path.parent / "executed"
    code = f"__import__('pathlib').Path({str(victim)!r}).touch()"
    return ros1(path, f"string X=x'+{code}+'\nstring Y=x\"\"\"+{code}+\"\"\"\nuint8 x\n", b"\7")


@case
def rosbag2_names_lead_out(path: Path) -> object:
    folder = tinybags.write(path, [("/x", 1, tinybags.number(1))])
    metadata = (folder / "metadata.yaml").read_text()
    (folder / "metadata.yaml").write_text(metadata.replace(f"- {path.name}.mcap", "- ../.."))
    return opened(folder)


@case
def rosbag2_yaml_of_billion_laughs(path: Path) -> object:
    folder = tinybags.write(path, [("/x", 1, tinybags.number(1))])
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    metadata = (folder / "metadata.yaml").read_text().replace("storage_identifier: mcap", "storage_identifier: *a9")
    (folder / "metadata.yaml").write_text(laughs + metadata)
    return opened(folder)


@case
def sqlite_view_without_end(path: Path) -> object:
    folder = tinybags.write(path, [("/x", 1, tinybags.number(1))], storage="sqlite3")
    with sqlite3.connect(folder / f"{path.name}.db3") as database:
        database.execute("DROP TABLE message_definitions")
        database.execute("CREATE VIEW message_definitions AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 "
                         "FROM n) SELECT id, 'a' AS topic_type, 'ros2msg' AS encoding, '' AS "
                         "encoded_message_definition, '' AS type_description_hash FROM n")
    return opened(folder)


@case
def sqlite_name_that_opens_another_file(path: Path) -> object:
    folder = tinybags.write(path, [("/x", 1, tinybags.number(1))], storage="sqlite3")
    return opened((folder / f"{path.name}.db3").rename(folder / "%2e%2e%2fother.db3"))


# a dataroot -----------------------------------------------------------------------------------------------------------
@case
def dataroot_file_outside(path: Path) -> object:
    (path.parent / "secret").write_text("x")
    path.mkdir()
    return view.Disk(path).size("../secret")


@case
def dataroot_json_deep(path: Path) -> object:
    path.write_bytes(b"[" * 10**6)
    return view.read_json(path)


def main(folder: Path) -> None:
    """Prints what each reader ends with."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    ends = {}
    for name, read in CASES.items():
        place = folder / name
        place.mkdir()
        (place / "out").mkdir()
        try:
            ends[name] = f"read: {str(read(place / 'file'))[:200]}"
        except BaseException as error:
            ends[name] = f"{type(error).__name__}: {error}".replace(f"{place}{os.sep}", "")
        outside = [str(one.relative_to(folder)) for one in folder.glob("up*")]
        assert not outside, f"{name} wrote {outside}"
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
