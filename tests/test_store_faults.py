"""The wire breaks, the server dies, bytes flip: no wrong byte is believed, nothing half is kept, the next try heals."""

import hashlib
import os
import random
import subprocess
import sys
import threading

import pytest

from stages.lib.errors import RemoteError, TemporaryRemoteError
from stages.store.bucket import PART_BYTES, Bucket, DifferentBytesError
from stages.store.patience import Patience
from tests.faultproxy import fault_proxy

QUICK = Patience(connect_s=5, stalled_s=2, sending_s=3, retries=2, attempts=2, first_wait_s=0.01, longest_wait_s=0.05)
SMALL = random.Random(1).randbytes(300_000)
LARGE = random.Random(2).randbytes(2 * PART_BYTES + 1000)
WRITES = [("small", SMALL, "PUT"), ("large", LARGE, "partNumber=2"), ("large2", LARGE, "partNumber=3")]
MANY = 1000  # more often than is tried


@pytest.fixture
def proxy(s3):
    with fault_proxy(s3.port) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3, proxy) -> Bucket:
    return Bucket(f"s3://{s3.make_bucket()}/store", endpoint=proxy.endpoint, region="us-east-1", patience=QUICK)


def uploads(s3, bucket: Bucket) -> list:
    """Parts of unfinished uploads that lie in the bucket."""
    return s3.client().list_multipart_uploads(Bucket=bucket.bucket).get("Uploads", [])


def served(s3, bucket: Bucket) -> Bucket:
    """The same bucket without the proxy."""
    return Bucket(bucket.where, endpoint=s3.endpoint, region="us-east-1", patience=QUICK)


ONCE = [
    {"kind": "reset"}, {"kind": "cut"}, {"kind": "hang"}, {"kind": "lose_answer"},
    {"kind": "answer", "status": 503, "code": "SlowDown"}, {"kind": "answer", "status": 500, "code": "InternalError"},
    {"kind": "answer", "status": 429, "code": "TooManyRequests"},
    {"kind": "answer", "status": 400, "code": "BadDigest"},
    {"kind": "answer", "status": 400, "code": "RequestTimeout"},
    {"kind": "answer", "status": 409, "code": "ConditionalRequestConflict"},
]
UP = [*ONCE, *({"kind": kind, "side": "up", "at": 150_000} for kind in ("reset", "cut", "flip"))]
DOWN = [*ONCE, *({"kind": kind, "side": "down", "at": 150_000} for kind in ("reset", "cut", "flip"))]


def fault_name(fault: dict) -> str:
    return "-".join(map(str, fault.values()))


# one fault heals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", UP, ids=fault_name)
def test_a_write_survives_one_fault(s3, bucket, proxy, fault):
    for name, data, match in WRITES:
        at = {"at": 500} if match == "partNumber=3" and "at" in fault else {}
        met = proxy.inject(**fault | {"match": match} | at)
        bucket.write(name, data)
        assert met.met == 1
        assert served(s3, bucket).read(name) == data
    assert uploads(s3, bucket) == []


@pytest.mark.parametrize("fault", ONCE, ids=fault_name)
@pytest.mark.parametrize("match", ["uploads=", "POST .*[?]uploadId="])
def test_the_beginning_and_the_end_of_a_large_write_survive_one_fault(s3, bucket, proxy, fault, match):
    proxy.inject(**fault | {"match": match})
    bucket.write("large", LARGE)
    assert served(s3, bucket).read("large") == LARGE


@pytest.mark.parametrize("fault", DOWN, ids=fault_name)
def test_a_read_survives_one_fault(bucket, proxy, tmp_path, fault):
    for data in (SMALL, LARGE):
        bucket.write("a", data)
        proxy.inject(**fault | {"match": "GET"})
        assert bucket.read("a") == data
        proxy.inject(**fault | {"match": "GET"})
        assert bucket.download("a", tmp_path / "a") == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "a").read_bytes() == data


@pytest.mark.parametrize("fault", [*ONCE, {"kind": "cut", "side": "down", "at": 200}], ids=fault_name)
def test_listing_asking_and_deleting_survive_one_fault(s3, bucket, proxy, fault):
    for name in "abc":
        bucket.write(name, SMALL)
    proxy.inject(**fault)
    assert sorted(bucket.names("")) == ["a", "b", "c"]
    if not fault.get("side"):
        proxy.inject(**fault)
        assert bucket.size("a") == len(SMALL)
    proxy.inject(**fault)
    bucket.delete(["a", "b"])
    assert list(served(s3, bucket).names("")) == ["c"]


@pytest.mark.parametrize("fault", UP, ids=fault_name)
def test_a_create_that_met_a_fault_is_still_the_one_that_created(s3, bucket, proxy, fault):
    proxy.inject(**fault)
    assert bucket.create("ac/key", SMALL)
    assert served(s3, bucket).read("ac/key") == SMALL
    proxy.inject(**fault)
    assert not bucket.create("ac/key", b"another")
    assert served(s3, bucket).read("ac/key") == SMALL


def test_a_slow_link_is_no_fault(bucket, proxy, tmp_path):
    proxy.inject("slow", side="up", bytes_per_s=2 << 20, times=MANY)
    bucket.write("a", LARGE[:3 << 20])
    proxy.heal()
    proxy.inject("slow", side="down", bytes_per_s=1 << 20, times=MANY)
    start = len(proxy.requests)
    assert bucket.download("a", tmp_path / "a") == hashlib.sha256(LARGE[:3 << 20]).hexdigest()
    assert len(proxy.requests) == start + 1, "a body that moves is not given up, however long it takes"


def test_a_broken_body_is_resumed_not_begun_again(bucket, proxy, tmp_path):
    bucket.write("a", LARGE)
    fault = proxy.inject("reset", side="down", at=10_000_000, match="GET")
    assert bucket.download("a", tmp_path / "a") == hashlib.sha256(LARGE).hexdigest()
    assert fault.met == 1
    assert [line.split()[0] for line in proxy.requests[-2:]] == ["GET", "GET"]


# faults that stay -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", [*ONCE, {"kind": "reset", "side": "up", "at": 150_000}], ids=fault_name)
def test_a_write_that_keeps_failing_leaves_nothing_and_says_it_may_pass(s3, bucket, proxy, fault):
    lost = fault["kind"] == "lose_answer"  # done, though nobody was told
    for name, data, match in WRITES:
        at = {"at": 500} if match == "partNumber=3" and "at" in fault else {}
        proxy.inject(**fault | {"match": match, "times": MANY} | at)
        with pytest.raises(TemporaryRemoteError, match=rf"^{bucket.where}/{name}: .*\n.*run the same command again"):
            bucket.write(name, data)
        proxy.heal()
        assert served(s3, bucket).read(name) in ((None, SMALL) if lost and name == "small" else (None,))
        assert uploads(s3, bucket) == []
        bucket.write(name, data)
        assert served(s3, bucket).read(name) == data


@pytest.mark.parametrize(("data", "match"), [(SMALL, "PUT"), (LARGE, "partNumber=2")], ids=["small", "large"])
def test_bytes_that_flip_every_time_are_refused_and_removed(s3, bucket, proxy, data, match):
    proxy.inject("flip", side="up", at=99, match=match, times=MANY)
    with pytest.raises(RemoteError, match=r"/a: the bytes that arrived? are not those that were sent"):
        bucket.write("a", data)
    proxy.heal()
    assert served(s3, bucket).read("a") is None
    assert uploads(s3, bucket) == []


def test_bytes_that_flip_on_the_way_back_every_time_are_not_believed(bucket, proxy, tmp_path):
    bucket.write("a", SMALL)
    proxy.inject("flip", side="down", at=99, match="GET", times=MANY)
    with pytest.raises(DifferentBytesError, match=r"/a: the bytes that arrive are not those that were sent, 2 times\n"
                                                  r".*roadmill store fsck"):
        bucket.read("a")
    assert bucket.download("a", tmp_path / "a") == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert bucket.download("a", tmp_path / "a") != hashlib.sha256(SMALL).hexdigest()


@pytest.mark.parametrize("damaged", [SMALL[:-7], SMALL[:50] + b"?" + SMALL[51:], b""],
                         ids=["truncated", "flipped", "emptied"])
def test_an_object_damaged_in_the_bucket_is_not_believed(s3, bucket, tmp_path, damaged):
    bucket.write("a", SMALL)
    stated = bucket.describe("a").sha256
    s3.client().put_object(Bucket=bucket.bucket, Key="store/a", Body=damaged, Metadata={"sha256": stated})
    with pytest.raises(DifferentBytesError):
        bucket.read("a")
    assert bucket.download("a", tmp_path / "a") == hashlib.sha256(damaged).hexdigest() != stated
    bucket.write("a", SMALL)
    assert bucket.read("a") == SMALL


def test_a_read_that_keeps_breaking_leaves_no_file(bucket, proxy, tmp_path):
    bucket.write("a", LARGE)
    for kind in ("cut", "reset"):
        proxy.inject(kind, side="down", at=1000, match="GET", times=MANY)
        with pytest.raises(TemporaryRemoteError, match=r"/a: the connection broke\n.*run the same command again"):
            bucket.download("a", tmp_path / "a")
        proxy.heal()
        assert not (tmp_path / "a").exists()


def test_a_hung_server_is_given_up_in_bounded_time(bucket, proxy):
    proxy.inject("hang", times=MANY)
    with pytest.raises(TemporaryRemoteError, match=r"no answer, or nothing moved, for too long\n"):
        bucket.read("a")
    assert len(proxy.requests) == 1 + QUICK.retries, "each waited QUICK.stalled_s"


def test_a_full_disk_is_not_the_clouds_fault(bucket, tmp_path):
    bucket.write("a", SMALL)
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        bucket.download("a", tmp_path / "full")
    assert not (tmp_path / "full").is_symlink()


# the server dies ------------------------------------------------------------------------------------------------------
def test_a_server_killed_in_the_middle_of_a_write_loses_nothing_it_acknowledged(s3, proxy, tmp_path):
    bucket = Bucket(f"s3://{s3.make_bucket()}/store", endpoint=proxy.endpoint, region="us-east-1", patience=QUICK)
    bucket.write("before", LARGE)
    proxy.inject("call", side="up", at=500_000, match="partNumber=2", call=s3.kill)
    with pytest.raises(TemporaryRemoteError, match=r"/during: .*\n"):
        bucket.write("during", LARGE)
    with pytest.raises(TemporaryRemoteError):
        bucket.read("before")
    s3.start()
    again = Bucket(bucket.where, endpoint=s3.endpoint, region="us-east-1", patience=QUICK)
    if s3.durable:
        assert again.read("before") == LARGE
        assert again.read("during") is None
        again.write("during", LARGE)
        assert again.read("during") == LARGE
    else:
        os.environ.update(AWS_ACCESS_KEY_ID=s3.key, AWS_SECRET_ACCESS_KEY=s3.secret)  # the user was lost, too
        again = Bucket(bucket.where, endpoint=s3.endpoint, region="us-east-1", patience=QUICK)
        for work in (again.read, again.size):
            with pytest.raises(RemoteError, match="there is no such bucket"):
                work("before")


def test_a_server_that_comes_back_in_time_is_not_noticed(s3, proxy):
    patient = Patience(connect_s=2, stalled_s=5, sending_s=5, retries=6, attempts=6, first_wait_s=0.2, longest_wait_s=2)
    bucket = Bucket(f"s3://{s3.make_bucket()}", endpoint=proxy.endpoint, region="us-east-1", patience=patient)
    fault = proxy.inject("reset", times=MANY)
    timer = threading.Timer(1.5, proxy.heal)
    timer.start()
    bucket.write("a", LARGE)
    assert fault.met > 2
    assert bucket.read("a") == LARGE


# memory ---------------------------------------------------------------------------------------------------------------
MEASURE = """
import re, sys
from pathlib import Path
from stages.store.bucket import Bucket
def peak_kb():  # not ru_maxrss, which a child inherits from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
url, endpoint, folder = sys.argv[1:]
bucket, folder = Bucket(url, endpoint=endpoint), Path(folder)
bucket.write("first", folder / "first")
bucket.download("first", folder / "back")
before = peak_kb()
bucket.write("large", folder / "large")
put = peak_kb()
bucket.download("large", folder / "back")
get = peak_kb()
print(put - before, get - before)
"""


def test_memory_does_not_grow_with_the_file(s3, tmp_path):
    """300 MB up and down, over what 16 MB took, in a process of its own."""
    (tmp_path / "first").write_bytes(bytes(2 * PART_BYTES))
    with (tmp_path / "large").open("wb") as file:
        block = random.Random(3).randbytes(1 << 20)
        for _ in range(300):
            file.write(block)
    done = subprocess.run([sys.executable, "-c", MEASURE, f"s3://{s3.make_bucket()}", s3.endpoint, str(tmp_path)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    put_kb, get_kb = map(int, done.stdout.split())
    assert put_kb < 64 << 10, f"{put_kb >> 10} MB more for a put of 300 MB"
    assert get_kb < 64 << 10, f"{get_kb >> 10} MB more for a get of 300 MB"
