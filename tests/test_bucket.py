"""An S3 bucket keeps exactly the bytes it is given, and says plainly why it can't; on every server we can start."""

import hashlib
import os
import pickle
import random
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest

from stages.lib.errors import ConfigError, DataError, RemoteError, TemporaryRemoteError
from stages.store import bucket as module
from stages.store.bucket import PAGE, PART_BYTES, Bucket, DifferentBytesError
from stages.store.bucket_errors import read_trouble
from stages.store.patience import Patience
from tests.faultproxy import fault_proxy

QUICK = Patience(retries=2, attempts=2, first_wait_s=0.01, longest_wait_s=0.05)


@pytest.fixture
def bucket(s3) -> Bucket:
    return Bucket(f"s3://{s3.make_bucket()}/team/store", endpoint=s3.endpoint, region="us-east-1", patience=QUICK)


def noise(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


# bytes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_bytes", [0, 1, 100_000, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 5])
@pytest.mark.parametrize("kind", [bytes, Path])
def test_what_was_written_is_read(bucket, tmp_path, num_bytes, kind):
    data = noise(num_bytes)
    (tmp_path / "source").write_bytes(data)
    bucket.write("cas/aa/x", data if kind is bytes else tmp_path / "source")
    assert bucket.read("cas/aa/x") == data
    assert bucket.download("cas/aa/x", tmp_path / "target") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "target").read_bytes() == data
    assert bucket.size("cas/aa/x") == num_bytes


def test_what_is_not_there_is_none(bucket, tmp_path):
    assert bucket.read("no/such") is None
    assert bucket.size("no/such") is None
    assert bucket.describe("no/such") is None
    assert bucket.download("no/such", tmp_path / "target") is None
    assert not (tmp_path / "target").exists()
    bucket.delete(["no/such"])
    assert list(bucket.list("no/")) == []


def test_a_write_replaces_and_tells_its_sha256_etag_and_version(bucket, s3):
    bucket.write("a", b"old")
    bucket.write("a", b"hello")
    found = bucket.describe("a")
    assert (found.bytes, found.etag) == (5, '"5d41402abc4b2a76b9719d911017c592"')
    assert found.sha256 == hashlib.sha256(b"hello").hexdigest()
    s3.client().put_object(Bucket=bucket.bucket, Key="team/store/foreign", Body=b"x")
    assert bucket.describe("foreign").sha256 is None
    assert bucket.read("foreign") == b"x"


def test_a_known_sha256_is_held_against_the_data(bucket, tmp_path):
    for num_bytes in (10, PART_BYTES + 10):
        data = noise(num_bytes)
        (tmp_path / "f").write_bytes(data)
        bucket.write("a", tmp_path / "f", hashlib.sha256(data).hexdigest())
        assert bucket.describe("a").sha256 == hashlib.sha256(data).hexdigest()
        with pytest.raises(DataError, match=r"is not what its sha256 0000000000000000… says.*\n.*run the command"):
            bucket.write("b", tmp_path / "f", "0" * 64)
        assert bucket.size("b") is None


def test_ranges_are_of_the_object_that_was_described(bucket):
    data = noise(1000)
    bucket.write("log.mcap", data)
    etag = bucket.describe("log.mcap").etag
    assert bucket.read_range("log.mcap", 10, 20, etag) == data[10:20]
    assert bucket.read_range("log.mcap", 990, 5000, etag) == data[990:]
    bucket.write("log.mcap", data[::-1])
    with pytest.raises(RemoteError, match=r"log\.mcap was replaced while it was being read\n.*roadmill scan"):
        bucket.read_range("log.mcap", 10, 20, etag)
    bucket.delete(["log.mcap"])
    with pytest.raises(RemoteError, match="was removed while"):
        bucket.read_range("log.mcap", 10, 20, etag)


def test_long_listings_and_deletions_are_complete(bucket):
    names = {f"ac/sample/g/{i * 40503 % 65536:04x}.r" for i in range(2 * PAGE + 300)} | {"ac/zz~_.-", "other"}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: bucket.write(name, b"1"), names))
    assert sorted(bucket.names("")) == sorted(names)
    assert sorted(bucket.names("ac/sample/g/")) == sorted(names - {"ac/zz~_.-", "other"})
    found = {one.name: one for one in bucket.list("ac/")}
    assert set(found) == names - {"other"}
    assert found["ac/zz~_.-"].bytes == 1
    assert abs(found["ac/zz~_.-"].modified_s - Path(__file__).stat().st_atime) < 10 * 365 * 86400
    bucket.delete(names - {"other"})
    assert list(bucket.names("")) == ["other"]


# two writers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("equal", [False, True])
def test_of_sixteen_writers_that_create_one_name_one_wins(bucket, equal):
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        return bucket.create("ac/key", b"same" if equal else b"%d" % number)

    for _ in range(3):
        with ThreadPoolExecutor(16) as threads:
            won = list(threads.map(create, range(16)))
        assert sum(won) == 1
        assert bucket.read("ac/key") == (b"same" if equal else b"%d" % won.index(True))
        assert not bucket.create("ac/key", b"late")
        bucket.delete(["ac/key"])


def test_of_writers_of_one_name_the_object_is_that_of_one_whole(bucket):
    blobs = [noise(PART_BYTES + 100, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda data: bucket.write("cas/x", data), blobs))
    assert bucket.read("cas/x") in blobs


def test_a_bucket_can_be_pickled_and_holds_no_credentials(bucket, s3):
    bucket.write("a", b"1")
    packed = pickle.dumps(bucket)
    assert s3.secret.encode() not in packed
    assert pickle.loads(packed).read("a") == b"1"


# requests -------------------------------------------------------------------------------------------------------------
def test_no_request_is_made_that_is_not_needed(s3, bucket, tmp_path):
    with fault_proxy(s3.port) as proxy:
        seen = Bucket(bucket.where, endpoint=proxy.endpoint, patience=QUICK)

        def requests(work) -> list[str]:
            proxy.requests.clear()
            work()
            return [line.split()[0] for line in proxy.requests]

        assert requests(lambda: seen.write("a", b"1")) == ["PUT"]
        assert requests(lambda: seen.create("b", b"")) == ["PUT"]
        assert requests(lambda: seen.create("b", b"")) == ["PUT"]
        assert requests(lambda: seen.read("a")) == ["GET"]
        assert requests(lambda: seen.describe("a")) == ["HEAD"]
        assert requests(lambda: seen.size("none")) == ["HEAD"]
        assert requests(lambda: list(seen.list(""))) == ["GET"]
        assert requests(lambda: seen.delete(["a", "b", "none"])) == ["POST"]
        several = requests(lambda: seen.write("c", bytes(2 * PART_BYTES + 1)))
        assert several == ["POST", *["PUT"] * 3, "POST", *(["HEAD"] if s3.name == "radosgw" else [])]
        assert requests(lambda: seen.download("c", tmp_path / "c")) == ["GET"]


# encryption -----------------------------------------------------------------------------------------------------------
def test_an_error_of_a_worker_keeps_its_text_on_the_way_home():
    error = pickle.loads(pickle.dumps(DifferentBytesError("s3://b/a: other bytes", "5ha")))
    assert (str(error), error.sha256) == ("s3://b/a: other bytes", "5ha")


def test_the_server_is_asked_to_encrypt(s3, bucket):
    if s3.name == "radosgw":
        pytest.skip("this radosgw has no key for encryption")
    for num_bytes in (1, PART_BYTES + 1):
        Bucket(bucket.where, endpoint=s3.endpoint, sse="aws:kms", sse_kms_key="k1").write("a", bytes(num_bytes))
        head = s3.client().head_object(Bucket=bucket.bucket, Key="team/store/a")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "k1")


def test_an_etag_that_is_no_md5_makes_the_object_be_read_back(bucket, monkeypatch):
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda *args, **kw: put(*args, **kw) | {"e_tag": '"of-another-kind"'})
    bucket.write("a", b"1")
    assert bucket.create("b", b"2")
    monkeypatch.setattr(obstore, "put", lambda store, name, data, attributes, **kw: put(
        store, name, b"other", attributes=attributes))
    with pytest.raises(RemoteError, match=r"the bytes that arrive are not those that were sent, 2 times\n.*store fsck"):
        bucket.write("a", b"1")
    assert bucket.read("a") is None


# what goes wrong ------------------------------------------------------------------------------------------------------
WORDS = [
    (404, "NoSuchBucket", RemoteError, "there is no such bucket", "set store.url"),
    (403, "AccessDenied", RemoteError, "access denied (HTTP 403 AccessDenied)", "aws sts get-caller-identity"),
    (403, "InvalidAccessKeyId", RemoteError, "does not know this access key", "store.profile"),
    (403, "SignatureDoesNotMatch", RemoteError, "the secret key is wrong", "store.profile"),
    (400, "ExpiredToken", RemoteError, "the session has expired", "aws sso login"),
    (403, "RequestTimeTooSkewed", RemoteError, "clock is more than 15 minutes off", "timedatectl"),
    (400, "AuthorizationHeaderMalformed", RemoteError, "in another region", "set store.region"),
    (301, "PermanentRedirect", RemoteError, "in another region", "set store.region"),
    (400, "KMS.DisabledException", RemoteError, "the key of the encryption can't be used", "store.sse_kms_key"),
    (403, "QuotaExceeded", RemoteError, "quota is used up", "roadmill store gc"),
    (418, "Teapot", RemoteError, "the server refuses (HTTP 418 Teapot)", "store.endpoint"),
    (503, "SlowDown", TemporaryRemoteError, "overloaded or in trouble (HTTP 503", "run the same command"),
    (500, "InternalError", TemporaryRemoteError, "overloaded or in trouble (HTTP 500", "run the same command"),
    (429, "TooManyRequests", TemporaryRemoteError, "overloaded or in trouble (HTTP 429", "run the same command"),
    (400, "BadDigest", TemporaryRemoteError, "the bytes that arrived are not those", "run the same command"),
]


@pytest.mark.parametrize("word", WORDS, ids=[word[1] for word in WORDS])
def test_what_a_server_refuses_is_told_with_what_to_do(s3, bucket, tmp_path, word):
    status, code, kind, what, advice = word
    with fault_proxy(s3.port) as proxy:
        proxy.inject("answer", status=status, code=code, times=1000)
        seen = Bucket(bucket.where, endpoint=proxy.endpoint, patience=QUICK)
        for work in (lambda: seen.read("a"), lambda: seen.write("a", b"1"), lambda: seen.size("a"),
                     lambda: list(seen.list("")), lambda: seen.create("a", b""), lambda: seen.delete(["a"]),
                     lambda: seen.write("big", bytes(PART_BYTES + 1)), lambda: seen.download("a", tmp_path / "a")):
            with pytest.raises(RemoteError) as caught:
                work()
            assert type(caught.value) is kind
            assert caught.value.exit_code == (75 if kind is TemporaryRemoteError else 4)
            text = str(caught.value)
            assert text.startswith(bucket.where), text
            assert what in text, text
            assert advice in text, text
            assert len(text.splitlines()) <= 3


def test_a_bucket_that_is_not_there_is_no_empty_bucket(s3, tmp_path):
    gone = Bucket("s3://no-such-bucket-here", endpoint=s3.endpoint, patience=QUICK)
    for work in (gone.read, gone.size, gone.describe, lambda name: gone.download(name, tmp_path / "x"),
                 lambda name: list(gone.list("")), lambda name: gone.write(name, b""),
                 lambda name: gone.delete([name])):
        with pytest.raises(RemoteError, match=r"^s3://no-such-bucket-here.*: there is no such bucket .*\n.*store\.url"):
            work("a")


@pytest.mark.parametrize("name", ["../up", "a/../../up", "./here", "a//b", "tab\tname"])
def test_names_that_would_leave_a_folder_are_never_listed(bucket, s3, name):
    s3.client().put_object(Bucket=bucket.bucket, Key=f"team/store/{name}", Body=b"")
    with pytest.raises(RemoteError, match=r"it has an object whose name no file can have: .*\n.*store\.url") as caught:
        list(bucket.list(""))
    assert type(caught.value) is RemoteError


def test_a_server_that_is_not_there_is_temporary_and_names_the_endpoint(bucket, s3):
    with fault_proxy(s3.port) as proxy:
        endpoint = proxy.endpoint
    off = Bucket(bucket.where, endpoint=endpoint, patience=QUICK)
    with pytest.raises(TemporaryRemoteError, match=r"the connection was refused\n.*check store\.endpoint"):
        off.read("a")
    with pytest.raises(TemporaryRemoteError, match=r"name can't be looked up\n.*store\.endpoint"):
        Bucket(bucket.where, endpoint="http://no-such-host.invalid", patience=QUICK).read("a")
    with pytest.raises(RemoteError, match=r"does not speak TLS\n.*http://"):
        Bucket(bucket.where, endpoint=s3.endpoint.replace("http:", "https:"), patience=QUICK).read("a")


def test_without_credentials_it_is_said_how_to_get_them(bucket, s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteError, match=r"gives no credentials\n.*aws configure.*store\.profile"):
        bucket.read("a")
    Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
        f"[lab]\naws_access_key_id = {s3.key}\naws_secret_access_key = {s3.secret}\n")
    assert Bucket(bucket.where, endpoint=s3.endpoint, profile="lab", patience=QUICK).read("a") is None
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert Bucket(bucket.where, patience=QUICK).read("a") is None
    with pytest.raises(ConfigError, match=r"no AWS profile named nobody\n.*aws configure list-profiles"):
        Bucket(bucket.where, endpoint=s3.endpoint, profile="nobody").read("a")


@pytest.mark.parametrize("settings", [
    {"url": "s3://AKIAKEY:S3CR3T@bucket/x"}, {"url": "https://bucket/x?X-Amz-Signature=S3CR3T"},
    {"url": "s3://bucket/../S3CR3T"}, {"url": "s3://bucket/a//S3CR3T"},
    {"url": "s3://bucket", "endpoint": "https://user:S3CR3T@host"},
    {"url": "s3://bucket", "endpoint": "http://host/?token=S3CR3T"},
    {"url": "s3://bucket", "endpoint": "ftp://S3CR3T"},
], ids=str)
def test_addresses_that_may_hold_a_secret_are_refused_without_repeating_it(settings):
    with pytest.raises(ConfigError, match=r"set it to (s3|https)://") as caught:
        Bucket(**settings)
    assert "S3CR3T" not in str(caught.value)


def test_encryption_settings_that_make_no_sense_are_refused():
    for settings in ({"sse": "rot13"}, {"sse": "AES256", "sse_kms_key": "k"}, {"sse_kms_key": "k"}):
        with pytest.raises(ConfigError, match=r"store\.sse is .*\n  set it to AES256 or aws:kms"):
            Bucket("s3://bucket", **settings)


SECRET = "S3CR3Tkey/with+signs"


def test_no_secret_is_in_an_error_its_traceback_or_a_log(s3, bucket, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T0K3N")
    caplog.set_level("DEBUG")
    seen = Bucket(bucket.where, endpoint=s3.endpoint, region="us-east-1", patience=QUICK)
    for work in (lambda: seen.read("a"), lambda: seen.write("a", b""), lambda: list(seen.list("")),
                 lambda: seen.create("a", b""), lambda: seen.size("a"), lambda: seen.write("a", bytes(PART_BYTES + 1))):
        try:
            work()
        except RemoteError:
            shown = traceback.format_exc() + caplog.text
        for word in (SECRET, "T0K3N", s3.key, "Signature=", "StringToSign", "AWS4-HMAC", "Credential="):
            assert word not in shown, word


def test_of_a_servers_answer_only_status_and_code_are_shown():
    text = ('Error performing GET http://h/b/k?X-Amz-Signature=5ECRET&uploadId=u - status code: 403 Forbidden: <Error>'
            "<Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKIAEXAMPLE</AWSAccessKeyId><StringToSign>AWS4 5ECRET"
            "</StringToSign></Error>")
    told = str(read_trouble(text).error("s3://b", "k"))
    assert told.splitlines()[0] == ("s3://b/k: the secret key is wrong, or something on the way changes requests "
                                    "(HTTP 403 SignatureDoesNotMatch)")
    assert "5ECRET" not in told
    assert "AKIA" not in told


FAKETIME = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]


def test_a_client_whose_clock_is_off_is_told_so(s3, bucket):
    if not s3.checks:
        pytest.skip(f"{s3.name} does not look at the time of a request")
    if not FAKETIME:
        pytest.skip("libfaketime is not installed: apt-get install libfaketime")
    code = f"from stages.store.bucket import Bucket; Bucket({bucket.where!r}, endpoint={s3.endpoint!r}).read('a')"
    for shift in ("-20m", "+20m"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                              env=os.environ | {"LD_PRELOAD": str(FAKETIME[0]), "FAKETIME": shift})
        assert "clock is more than 15 minutes off the server's (HTTP 403 RequestTimeTooSkewed)" in done.stderr
    assert module.CREDENTIALS_LIVE.total_seconds() < 600
