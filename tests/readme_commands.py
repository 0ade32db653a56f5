"""Runs every command of a README in the current checkout, in order, and fails with the first that fails.

Commands are the lines of its ```sh blocks, without a leading `$ `, comments and output. A block marked ```sh setup is
what a reader does once, before (clone, make demo), and is left out here; CI has done it. Those marked ```sh aws run
against an S3 server of this machine that has the bucket `my-bucket`.

    python -m tests.readme_commands README.md
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.servers import running


def commands(text: str) -> list[str]:
    """The command lines of all ```sh and ```sh aws blocks."""
    found = []
    for block in re.findall(r"^```sh(?: aws)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ").split("  #")[0].strip()
            if command and not command.startswith("#"):
                found.append(command)
    return found


def main() -> int:
    """Exit code of the first command that fails, else 0."""
    names = {f"GIT_{role}_{what}": "readme@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**names, **os.environ, "PATH": f"{Path.cwd() / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as folder, running("moto", Path(folder)) as server:
        server.client().create_bucket(Bucket="my-bucket")
        environment |= {"AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": server.key,
                        "AWS_SECRET_ACCESS_KEY": server.secret, "AWS_DEFAULT_REGION": "us-east-1"}
        for command in commands(Path(sys.argv[1]).read_text()):
            print(f"$ {command}", flush=True)
            code = subprocess.run(["bash", "-c", command], env=environment).returncode
            if code:
                print(f"README: `{command}` ended with {code}", file=sys.stderr)
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
