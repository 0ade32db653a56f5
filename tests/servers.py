"""Real S3 servers for the tests, started and stopped by them: moto, and Ceph's radosgw where it is installed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import pytest

READY_S = 90  # a radosgw that was killed may wait 20 s for its own lock
CEPH = ("ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "radosgw", "radosgw-admin")
DAEMONS = {"mon.a": "ceph-mon -i a", "osd.0": "ceph-osd -i 0", "client.rgw.a": "radosgw -n client.rgw.a"}
CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon_port}
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {root}/keyring
auth allow insecure global id reclaim = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {root}/run
log file = {root}/log/$name.log
admin socket = {root}/run/$name.asok
pid file = {root}/run/$name.pid
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = 10737418240
osd memory target = 1073741824
[mon.a]
mon data = {root}/mon/a
mon addr = v2:127.0.0.1:{mon_port}
[osd.0]
osd data = {root}/osd0
[client.rgw.a]
rgw data = {root}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw dns name = localhost
"""


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """An S3 server on the loopback.

    durable  what it acknowledged is there after kill and start
    checks   it refuses a body that is not the one that was signed
    """

    name = ""
    ready = "/"
    durable = False
    checks = False

    def __init__(self) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.key, self.secret = "", ""

    def client(self, service: str = "s3"):
        """boto3's client of this server."""
        return boto3.client(service, endpoint_url=self.endpoint, region_name="us-east-1",
                            aws_access_key_id=self.key, aws_secret_access_key=self.secret)

    def make_bucket(self) -> str:
        """A new, empty bucket."""
        name = f"b{uuid.uuid4().hex}"
        self.client().create_bucket(Bucket=name)
        return name

    def wait(self) -> None:
        """Returns when the server answers."""
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(self.endpoint + self.ready, timeout=2).close()
                return
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"{self.name} does not answer on {self.endpoint}")


class Moto(Server):
    """moto's server with authentication; it keeps everything in memory."""

    name = "moto"
    ready = "/moto-api/data.json"

    def start(self) -> None:
        """Starts the server; its first four calls, which make the user, need no signature."""
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(self.port)], stdout=self.log, stderr=self.log,
            env=os.environ | {"INITIAL_NO_AUTH_ACTION_COUNT": "3"})
        self.wait()
        self.key, self.secret = "none", "none"
        iam = self.client("iam")
        iam.create_user(UserName="tester")
        made = iam.create_access_key(UserName="tester")["AccessKey"]
        iam.put_user_policy(UserName="tester", PolicyName="all", PolicyDocument=(
            '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'))
        self.key, self.secret = made["AccessKeyId"], made["SecretAccessKey"]

    def kill(self) -> None:
        """Ends the server at once."""
        self.process.kill()
        self.process.wait()

    stop = kill


    def reader(self) -> dict[str, str]:
        """AWS's variables of a user who may only read."""
        iam = self.client("iam")
        iam.create_user(UserName="reader")
        made = iam.create_access_key(UserName="reader")["AccessKey"]
        iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=(
            '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], '
            '"Resource": "*"}]}'))
        return {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}


class Rados(Server):
    """One monitor, one storage daemon and radosgw of Ceph, on the loopback."""

    name = "radosgw"
    durable = True
    checks = True

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.key, self.secret = "testkey", "testsecret"
        self.env = os.environ | {"CEPH_CONF": str(root / "ceph.conf")}

    def start(self) -> None:
        """Starts what does not run, on the data that is there; makes the cluster the first time."""
        if not self.root.exists():
            self._make()
        for daemon, command in DAEMONS.items():
            if not self._alive(daemon):
                self._run(command)
            if daemon == "osd.0" and not (self.root / "placed").exists():
                self._run("ceph osd crush add osd.0 1.0 root=default host=one")
                (self.root / "placed").touch()
        self.wait()
        if not (self.root / "user").exists():
            self._run(f"radosgw-admin user create --uid=test --display-name=test --access-key={self.key} "
                      f"--secret-key={self.secret}")
            (self.root / "user").touch()

    def kill(self) -> None:
        """Kills all daemons at once."""
        for daemon in DAEMONS:
            self._signal(daemon, signal.SIGKILL)

    def stop(self) -> None:
        """Kills all daemons and removes the data."""
        self.kill()
        shutil.rmtree(self.root, ignore_errors=True)

    def _make(self) -> None:
        for folder in ("mon", "osd0", "run", "log", "rgw"):
            (self.root / folder).mkdir(parents=True)
        mon_port, fsid, ring = free_port(), uuid.uuid4(), self.root / "keyring"
        (self.root / "ceph.conf").write_text(CEPH_CONF.format(
            root=self.root, port=self.port, mon_port=mon_port, fsid=fsid))
        self._run(f"monmaptool --create --fsid {fsid} --addv a [v2:127.0.0.1:{mon_port}] {self.root}/monmap")
        self._run(f"ceph-authtool --create-keyring {ring} --gen-key -n mon. --cap mon", "allow *")
        self._run(f"ceph-authtool {ring} --gen-key -n client.admin --cap mon", "allow *", "--cap", "osd", "allow *")
        self._run(f"ceph-authtool {ring} --gen-key -n client.rgw.a --cap mon", "allow *", "--cap", "osd", "allow *")
        self._run(f"ceph-authtool {ring} --gen-key -n osd.0 --cap mon", "allow profile osd", "--cap", "osd", "allow *")
        self._run(f"ceph-mon --mkfs -i a --monmap {self.root}/monmap --keyring {ring}")
        self._run("ceph-mon -i a")
        self._run(f"ceph auth import -i {ring}")
        osd = uuid.uuid4()
        self._run(f"ceph osd new {osd}")
        self._run(f"ceph-osd -i 0 --mkfs --osd-uuid {osd}")

    def _run(self, command: str, *words: str) -> None:
        done = subprocess.run([*command.split(), *words], env=self.env, capture_output=True, text=True, timeout=READY_S)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def _pid(self, daemon: str) -> int:
        with suppress(OSError, ValueError):
            return int((self.root / "run" / f"{daemon}.pid").read_text())
        return 0

    def _alive(self, daemon: str) -> bool:
        with suppress(OSError):
            if pid := self._pid(daemon):
                return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        return False

    def _signal(self, daemon: str, number: int) -> None:
        if self._alive(daemon):
            os.kill(self._pid(daemon), number)
            while self._alive(daemon):
                time.sleep(0.05)


@contextmanager
def running(name: str, folder: Path) -> Iterator[Server]:
    """A running server; skips the test where its programs are not installed."""
    if name == "radosgw" and (missing := [program for program in CEPH if not shutil.which(program)]):
        pytest.skip(f"{missing[0]} is not installed: apt-get install ceph-mon ceph-osd ceph-common ceph-base radosgw")
    server = Rados(folder / "ceph") if name == "radosgw" else Moto()
    try:
        server.start()
        yield server
    finally:
        server.stop()
