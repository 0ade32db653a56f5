"""Put and get of 1,000 x 100 KB and 20 x 50 MB on real S3 servers, beside a plain copy and AWS's own tools.

    python -m tests.benchmarks.bench_bucket moto radosgw [--aws AWS_PROGRAM]

One row per way: MB/s up and down, and the same as a ratio to Bucket's. All in one run, on one machine, which is also
the server: what the server computes is in the figures of every way alike. Without an `aws` program its row is left out.
"""

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from boto3.s3.transfer import TransferConfig

from stages.store.bucket import Bucket
from tests.servers import Server, running

SIZES = {"1,000 x 100 KB": (1000, 100_000), "20 x 50 MB": (20, 50_000_000)}
THREADS = 8


def each(work: Callable[[str], object], names: list[str]) -> None:
    """Does the work for all names, THREADS at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, names))


def ways(server: Server, source: Path, target: Path, aws: str | None) -> dict[str, tuple[Callable, Callable]]:
    """Way -> (put(names), get(names)); each into a bucket of its own."""
    buckets = {way: server.make_bucket() for way in ("obstore", "boto3", "aws")}
    bucket = Bucket(f"s3://{buckets['obstore']}", endpoint=server.endpoint, region="us-east-1")
    client, config = server.client(), TransferConfig(max_concurrency=4)
    copied = Path(tempfile.mkdtemp(dir=source.parent))
    found = {
        "plain copy": (lambda names: each(lambda name: shutil.copyfile(source / name, copied / name), names),
                       lambda names: each(lambda name: shutil.copyfile(copied / name, target / name), names)),
        "Bucket": (lambda names: each(lambda name: bucket.write(name, source / name), names),
                   lambda names: each(lambda name: bucket.download(name, target / name), names)),
        "boto3 upload_file": (
            lambda names: each(lambda name: client.upload_file(
                str(source / name), buckets["boto3"], name, Config=config), names),
            lambda names: each(lambda name: client.download_file(
                buckets["boto3"], name, str(target / name), Config=config), names)),
    }
    if aws:
        copy = [*aws.split(), "s3", "cp", "--recursive", "--quiet", "--endpoint-url", server.endpoint]
        found["aws s3 cp"] = (lambda names: subprocess.run([*copy, str(source), f"s3://{buckets['aws']}"], check=True),
                              lambda names: subprocess.run([*copy, f"s3://{buckets['aws']}", str(target)], check=True))
    return found


def bench(server: Server, folder: Path, aws: str | None) -> None:
    """Prints a row for each size and way."""
    os.environ.update(AWS_ACCESS_KEY_ID=server.key, AWS_SECRET_ACCESS_KEY=server.secret, AWS_REGION="us-east-1",
                      AWS_EC2_METADATA_DISABLED="true")
    for label, (count, size) in SIZES.items():
        source, target = folder / "source", folder / "target"
        names = [f"{number:04d}" for number in range(count)]
        source.mkdir()
        for number, name in enumerate(names):
            (source / name).write_bytes(random.Random(number).randbytes(size))
        rows = {}
        for way, (put, get) in ways(server, source, target, aws).items():
            target.mkdir()
            speeds = []
            for work in (put, get):
                start, cpu = time.perf_counter(), sum(os.times()[:4])
                work(names)
                seconds = time.perf_counter() - start
                speeds += [count * size / 1e6 / seconds, (sum(os.times()[:4]) - cpu) / seconds]
            assert all((target / name).read_bytes() == (source / name).read_bytes() for name in names[::7])
            shutil.rmtree(target)
            rows[way] = speeds
        ours = rows["Bucket"]
        for way, (up, up_cpu, down, down_cpu) in rows.items():
            print(f"| {server.name} | {label} | {way} | {up:.0f} | {up / ours[0]:.2f} | {up_cpu:.2f} | "
                  f"{down:.0f} | {down / ours[2]:.2f} | {down_cpu:.2f} |", flush=True)
        shutil.rmtree(source)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("servers", nargs="+", choices=["moto", "radosgw"])
    parser.add_argument("--aws", default=shutil.which("aws"))
    settings = parser.parse_args()
    print("| server | size | way | put MB/s | / Bucket | client cores | get MB/s | / Bucket | client cores |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for name in settings.servers:
        with tempfile.TemporaryDirectory() as folder, running(name, Path(folder)) as server:
            bench(server, Path(folder), settings.aws)
