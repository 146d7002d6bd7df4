"""A head node that `ray start` makes, with ports and a temporary folder of its own, and jobs submitted to it from a clean checkout.

with Head(Path("/tmp/p"), cpu=False) as head:
    process = head.submit(["python", "-m", "ray_jobs.check_data"], file)
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parent.parent
TRAVELS = ("nli", "ray_jobs", "configs", "data/sample", "pyproject.toml", "runtime_env.yaml")


class Head:
    """The node, its address, and the checkout that jobs are submitted from."""

    def __init__(self, folder: Path, cpu: bool) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        copy_checkout(self.checkout)
        self.environment = os.environ | {"MISTRAL_API_KEY": "key-of-no-account", "PATH": path_with_python(folder)}
        # As the README has it: where an earlier Ray left a token, a head asks for it, and whoever submits must show it.
        if (Path.home() / ".ray/auth_token").exists():
            self.environment.setdefault("RAY_AUTH_MODE", "token")
        gcs, dashboard, client, agent, agent_grpc = free_ports(5)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.command = [
            "ray",
            "start",
            "--head",
            "--block",
            "--disable-usage-stats",
            "--node-ip-address=127.0.0.1",
            f"--port={gcs}",
        ]
        self.command += [
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        ]
        self.command += [
            f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--temp-dir={folder / 'ray'}",
        ]
        self.command += ["--num-cpus=4", "--num-gpus=0", "--object-store-memory=300000000"] if cpu else []

    def __enter__(self) -> "Head":
        print("$", " ".join(self.command), flush=True)
        with open(self.folder / "head.log", "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while True:
            listed = subprocess.run(
                ["ray", "job", "list", "--address", self.address],
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if listed.returncode == 0:
                return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(
                    f"the head did not start; {listed.stderr[-1000:]}; {(self.folder / 'head.log').read_text()[-2000:]}"
                )
            time.sleep(0.5)

    def submit(self, command: Sequence[str], output: IO) -> subprocess.Popen:
        """Start `ray job submit`, which ends when the job does."""
        submitted = [
            "ray",
            "job",
            "submit",
            "--address",
            self.address,
            "--runtime-env",
            "runtime_env.yaml",
            "--",
            *command,
        ]
        return subprocess.Popen(
            submitted, cwd=self.checkout, env=self.environment, stdout=output, stderr=subprocess.STDOUT
        )

    def __exit__(self, *error: object) -> None:
        """End every process that the head started, and only those."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            processes = [root, *root.children(recursive=True)]
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=20)
        self.process.wait(20)


def copy_checkout(place: Path) -> None:
    """The tracked parts that a job needs, as a clean clone would hold them."""
    shutil.rmtree(place, ignore_errors=True)
    for name in TRAVELS:
        source, target = REPOSITORY / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def path_with_python(folder: Path) -> str:
    """A PATH on which `python` is this interpreter."""
    place = folder / "bin"
    place.mkdir(parents=True, exist_ok=True)
    script = place / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return os.pathsep.join([str(place), str(Path(sys.executable).parent), os.environ["PATH"]])


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(contextlib.closing(socket.socket())) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def find_processes(*words: str) -> list[int]:
    """Ids of the processes whose command line holds all the words, but for this one and those of `ray job submit`."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if all(word in line for word in words) and "job submit" not in line and process.pid != os.getpid():
            found.append(process.pid)
    return found
