"""The laboratory itself: hosts see each other, can be cut off and switched off."""

import sys
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

CONNECT = "import socket; socket.create_connection(('h1', 5000), timeout=1); print('reached')"
LISTEN = """
import socket
server = socket.create_server(('h1', 5000))
print(socket.gethostname(), flush=True)
while True:
    server.accept()
"""


def reaches(hosts: Hosts, folder: Path) -> bool:
    output = folder / "client"
    with open(output, "w") as file:
        hosts.start("h2", [sys.executable, "-c", CONNECT], file, {}).wait(10)
    return "reached" in output.read_text()


def test_hosts_can_be_cut_off_and_killed(tmp_path: Path) -> None:
    with Hosts(2) as hosts, open(tmp_path / "server", "w") as file:
        server = hosts.start("h1", [sys.executable, "-c", LISTEN], file, {})
        while (said := (tmp_path / "server").read_text()) != "h1\n":
            assert server.poll() is None and "h1\n".startswith(said)
        assert reaches(hosts, tmp_path)
        hosts.cut("h1")
        assert not reaches(hosts, tmp_path)
        hosts.join("h1")
        assert reaches(hosts, tmp_path)
        assert server.pid in hosts.processes("h1")
        hosts.kill("h1")
        assert server.wait(10) == -9
        assert hosts.processes("h1") == []
