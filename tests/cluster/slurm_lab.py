"""A real SLURM on this machine: one controller, several nodes, nothing under /etc, no systemd.

    with SlurmLab(nodes=2) as lab:
        lab.run("sbatch", "job.sh")

Debian's slurmd may run several times on a host, each as a node of its own name and port; all nodes
share the machine's loopback interface and its processors. Up in a quarter of a second. Needs root
and the packages of `.ci/install_packages`.
"""

import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
PARTITION = "main"
GPUS = 8  # that SLURM believes each node to have

# cred_expire: a requeued job waits so long before it may start again (120 s if not said).
# InactiveLimit and the like keep their defaults; intervals of the scheduler are as short as can be.
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout={node_timeout}
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0,sched_interval=2,bf_interval=2
JobRequeue=1
KillWait={kill_wait}
MinJobAge=300
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
"""


def missing() -> str:
    """Why no SLURM can be started here; empty where it can."""
    absent = [program for program in PROGRAMS if _which(program) is None]
    if absent:
        missing = ", ".join(absent)
        return f"SLURM cannot be started here: no {missing}; .ci/install_packages installs it"
    if os.geteuid() != 0:
        return "SLURM can only be started by root"
    return ""


class SlurmLab:
    """A context manager; jobs still there at the end are cancelled, and their processes killed.

    Args:
        nodes: n1, n2, ..., all in the partition "main".
        cpus_per_node: that SLURM believes each to have.
        node_timeout: seconds after which a silent node is down.
        grace_time: with a second partition "urgent", whose jobs take the nodes from those in "main"
            so many seconds after telling them, and send these back into the queue.
        kill_wait: seconds from SIGTERM to SIGKILL for what SLURM ends, as without a grace time.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus_per_node: int = 2,
        node_timeout: int = 300,
        grace_time: int | None = None,
        kill_wait: int = 5,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.conf = self.folder / "slurm.conf"
        self.environment = os.environ | {"SLURM_CONF": str(self.conf)}
        self._cpus = cpus_per_node
        self._node_timeout = node_timeout
        self._grace_time = grace_time
        self._kill_wait = kill_wait
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "SlurmLab":
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
            self.wait(lambda: "UP" in self.run("scontrol", "ping", check=False), 10)
            for node in self.nodes:
                self._start(node, "slurmd", "-D", "-f", str(self.conf), "-N", node)
            self.wait(lambda: all(self.node_state(node) == "idle" for node in self.nodes), 20)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """What a command of SLURM's prints. Raises CalledProcessError where it fails."""
        ended = subprocess.run(
            command,
            env=self.environment,
            check=check,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return ended.stdout.strip()

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def job(self, number: str) -> dict[str, str]:
        """Everything scontrol tells of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def node_state(self, node: str) -> str:
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T", check=False)

    def wait(self, condition: Callable[[], object], timeout: float) -> None:
        """Raises TimeoutError with what SLURM sees where `condition` does not come true."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                state = self.run("squeue", "--states=all", check=False)
                nodes = self.run("sinfo", "-N", "-l", check=False)
                raise TimeoutError(f"not within {timeout:g} s:\n{state}\n{nodes}")
            time.sleep(0.1)

    def kill_node(self, node: str) -> None:
        """As a loss of power would: all that runs on the node is gone at once, with no good-bye."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        tasks = set(self._processes({"SLURMD_NODENAME": node}))
        parents = {_parent(process) for process in tasks}
        steps = {process for process in parents if _name(process).startswith("slurmstepd")}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, none reports another's end
            for process in [*steps, *tasks]:
                with suppress(ProcessLookupError):
                    os.kill(process, number)

    def kill_worker(self, node: str) -> None:
        """Kills a process that torchrun started on the node."""
        worker = next(iter(self._processes({"SLURMD_NODENAME": node, "LOCAL_RANK": "0"})))
        os.kill(worker, signal.SIGKILL)

    def stop(self) -> None:
        with suppress(subprocess.SubprocessError, OSError, TimeoutError):
            self.run("scancel", "--full", f"--user={os.geteuid()}", check=False)
            self.wait(lambda: not self.run("squeue", "--noheader", check=False), 5)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in self._processes({}):  # a step outlives its slurmd
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        for name in ("state", "log", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        controller, *ports = free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
            f" CPUs={self._cpus} RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        main = f"PartitionName={PARTITION} Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP"
        if self._grace_time is not None:
            main += f" PriorityTier=1 PreemptMode=REQUEUE GraceTime={self._grace_time}"
            lines += ["PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE"]
            lines.append("PartitionName=urgent Nodes=ALL State=UP PriorityTier=9 PreemptMode=OFF")
        lines.append(main)
        text = CONFIGURATION.format(
            folder=self.folder,
            host=host,
            port=controller,
            node_timeout=self._node_timeout,
            kill_wait=self._kill_wait,
        )
        self.conf.write_text(text + "\n".join(lines) + "\n")
        for number in range(GPUS):
            device = os.makedev(1, 3)  # another /dev/null; SLURM wants a device, and never opens it
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o600, device)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        here: dict[str, str | Path] = {
            "key": key,
            "pid": "munge.pid",
            "log": "log/munged.log",
            "seed": "munge.seed",
        }
        files = [f"--{name}-file={self.folder / path}" for name, path in here.items()]
        socket_option = f"--socket={self.folder}/munge.socket"
        self._start("munged", "munged", "--foreground", "--force", socket_option, *files)
        self.wait(lambda: (self.folder / "munge.socket").exists(), 5)

    def _start(self, name: str, program: str, *arguments: str) -> None:
        """A daemon in the foreground of a process that ends with this one."""
        path = _which(program)
        assert path is not None
        with open(self.folder / "log" / f"{name}.out", "wb") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", path, *arguments],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _processes(self, wanted: Mapping[str, str]) -> Iterator[int]:
        """Processes that this SLURM started, with `wanted` in their environment."""
        words = {f"{name}={value}" for name, value in wanted.items()} | {f"SLURM_CONF={self.conf}"}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with suppress(OSError):
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    if {word.encode() for word in words} <= set(environment):
                        yield int(folder.name)


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _parent(process: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _name(process: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""
