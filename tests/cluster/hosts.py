"""Several hosts on one machine: namespaces for network and names, joined by a bridge.

    with Hosts(3) as hosts:
        process = hosts.start("h1", [sys.executable, "-m", ...], log)
        hosts.kill("h2")    # power loss: every process of the host dies at once
        hosts.cut("h3")     # its cable is pulled: nobody gets a reset, packets just stop

Hosts h1, h2, ... have addresses 10.77.0.1, 10.77.0.2, ... on eth0, names of their own, and the file
system of this machine, which so stands for a shared one. The bridge lives in a namespace
of its own, and no route leads out. Needs root and iproute2; `why_not` says what is missing.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

_NETWORK = "10.77.0"
# `ip netns exec` would mount a bare /sys; the host's name and /etc/hosts are its own
_ENTER = 'mount --bind "$1" /etc/hosts; hostname "$0"; shift; exec "$@"'


def why_not() -> str | None:
    """What keeps this machine from making namespaces; None: nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "nsenter", "unshare", "mount") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make a network namespace: {made.stderr.strip()}"
    mounts = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return f"cannot unshare: {mounts.stderr.strip()}" if mounts.returncode else None


class Hosts:
    """`count` hosts h1, h2, ...; a context manager that takes all down, processes too."""

    def __init__(self, count: int) -> None:
        self.names = [f"h{number}" for number in range(1, count + 1)]
        self._prefix = f"magnetron{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._hosts_file: Path | None = None
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Hosts":
        lines = ["127.0.0.1 localhost"]
        lines += [f"{_NETWORK}.{number} {name}" for number, name in enumerate(self.names, 1)]
        with tempfile.NamedTemporaryFile("w", prefix="hosts-", delete=False) as file:
            file.write("\n".join(lines) + "\n")
        self._hosts_file = Path(file.name)
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for number, name in enumerate(self.names, 1):
            space, port = self._space(name), self._port(name)
            _ip("netns", "add", space)
            peer = ("type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("link", "add", "eth0", "netns", space, *peer)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            with suppress(subprocess.CalledProcessError):
                self.kill(name)
                _ip("netns", "delete", self._space(name))
        with suppress(subprocess.CalledProcessError):
            _ip("netns", "delete", self._switch)
        for process in self._started:
            process.wait(10)
        if self._hosts_file is not None:
            self._hosts_file.unlink()

    def start(
        self, name: str, command: list[str], output: IO[str], environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        """Run a command on a host; its output goes to the file."""
        enter = ["nsenter", f"--net=/run/netns/{self._space(name)}"]
        enter += ["unshare", "--uts", "--mount", "--propagation", "private"]
        enter += ["sh", "-c", _ENTER, name, str(self._hosts_file)]
        process = subprocess.Popen(
            [*enter, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        self._started.append(process)
        return process

    def processes(self, name: str) -> list[int]:
        listed = _ip("netns", "pids", self._space(name))
        return [int(number) for number in listed.split()]

    def kill(self, name: str) -> None:
        """Power loss. Its sockets are closed by the kernel, as those of a real host are not: for
        that, cut its cable first."""
        for pid in self.processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, name: str) -> None:
        """The cable is pulled: processes live on, and nothing reaches them."""
        _ip("-n", self._switch, "link", "set", self._port(name), "down")

    def join(self, name: str) -> None:
        """The cable is back."""
        _ip("-n", self._switch, "link", "set", self._port(name), "up")

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _port(self, name: str) -> str:
        return f"port-{name}"


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
