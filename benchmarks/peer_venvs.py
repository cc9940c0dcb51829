"""One virtual environment for each peer framework, made on demand, apart from the project's own.

The peers' requirements contradict each other and ours. Each gets a folder with pinned versions;
torch stands first and constrains the rest, so that every figure is taken on one and the same torch
and no peer replaces it by another build.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
STAMP = "installed.txt"  # holds the requirements the folder was made from; written last


@dataclass(frozen=True)
class Environment:
    """What one peer needs beside torch.

    `without_dependencies` are installed with pip's --no-deps, for a package whose own list pulls
    in something that does not work beside a CPU build of torch.
    """

    name: str
    requirements: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()


LITGPT = Environment("litgpt", ("litgpt==0.5.13", "lightning==2.6.6", "numpy"))
# torchscale asks for timm, for drop_path only; timm brings torchvision, whose registry build is for
# a CUDA torch and fails to import beside a CPU one. The peer script holds a three-line stand-in.
TORCHSCALE = Environment(
    "torchscale", ("fairscale==0.4.0", "einops", "scipy", "numpy"), ("torchscale==0.3.0",)
)
TRANSFORMERS = Environment("transformers", ("transformers==5.23.0", "accelerate", "numpy"))
# torchtitan's wheel imports triton at module level, also where nothing is compiled
TORCHTITAN = Environment("torchtitan", ("torchtitan==0.3.0", "triton", "tokenizers", "numpy"))
# the loaders of benchmarks/data.py
STREAMING = Environment("mosaicml-streaming", ("mosaicml-streaming==0.13.0", "numpy"))
LITDATA = Environment("litdata", ("litdata==0.2.76", "numpy"))
DATASETS = Environment("datasets", ("datasets==5.2.0", "numpy"))
TORCHDATA = Environment("torchdata", ("torchdata==0.11.0", "numpy"))
DATATROVE = Environment("datatrove", ("datatrove==0.10.0", "numpy"))
# the frameworks that live in the project's own environment
OWN = Environment("own")


def cache_root() -> Path:
    """$XDG_CACHE_HOME/magnetron/benchmarks, with ~/.cache where the variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "magnetron" / "benchmarks"


def python_of(environment: Environment, root: Path) -> Path:
    """The interpreter that runs this peer: the current one for `OWN`."""
    if environment == OWN:
        return Path(sys.executable)
    return root / environment.name / "bin" / "python"


def _wanted(environment: Environment) -> str:
    lines = (TORCH, *environment.requirements, *environment.without_dependencies)
    return "\n".join(lines) + "\n"


def is_ready(environment: Environment, root: Path) -> bool:
    """True where the folder was installed to the end, from these very requirements."""
    if environment == OWN:
        return True
    stamp = root / environment.name / STAMP
    return stamp.is_file() and stamp.read_text() == _wanted(environment)


def install(environment: Environment, root: Path, timeout_seconds: float) -> None:
    """Makes the environment, or brings an older one up to these requirements.

    Raises subprocess.CalledProcessError where pip says no, subprocess.TimeoutExpired where it takes
    longer than `timeout_seconds`; pip's last lines stand in the exception's output. Either way no
    stamp is written and the next run tries again.
    """
    if is_ready(environment, root):
        return
    folder = root / environment.name
    folder.mkdir(parents=True, exist_ok=True)
    constraint = folder / "constraint.txt"
    constraint.write_text(TORCH + "\n")
    python = str(python_of(environment, root))

    def call(*command: str) -> None:
        subprocess.run(
            command,
            check=True,
            timeout=timeout_seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    pip = (python, "-m", "pip", "--disable-pip-version-check", "--quiet")
    if not Path(python).exists():
        call(sys.executable, "-m", "venv", str(folder))
    call(*pip, "install", TORCH)
    if environment.requirements:
        call(*pip, "install", "--constraint", str(constraint), *environment.requirements)
    if environment.without_dependencies:
        call(*pip, "install", "--no-deps", *environment.without_dependencies)
    # arrives through litdata and the like, and breaks whatever asks whether it is installed
    call(*pip, "uninstall", "--yes", "torchvision")
    (folder / STAMP).write_text(_wanted(environment))


def install_all(
    environments: Iterable[Environment], root: Path, timeout_seconds: float
) -> dict[str, str]:
    """Makes every environment that is missing; environment name -> reason where it failed."""
    failures: dict[str, str] = {}
    for environment in dict.fromkeys(environments):
        if is_ready(environment, root):
            continue
        print(f"installing {environment.name} into {root / environment.name}", file=sys.stderr)
        try:
            install(environment, root, timeout_seconds)
        except subprocess.TimeoutExpired:
            failures[environment.name] = f"not installed in {timeout_seconds:.0f} s"
        except subprocess.CalledProcessError as error:
            last_line = (error.output or "").strip().splitlines()[-1:] or [str(error)]
            failures[environment.name] = f"pip: {last_line[0]}"
    return failures


def install_peers(
    peers: Mapping[str, Environment], root: Path, timeout_seconds: float
) -> dict[str, str]:
    """The same for peers by name; peer -> reason where its environment failed."""
    failures = install_all(peers.values(), root, timeout_seconds)
    return {
        peer: failures[environment.name]
        for peer, environment in peers.items()
        if environment.name in failures
    }


def add_peer_arguments(parser: argparse.ArgumentParser, peers: Iterable[str], kept: str) -> None:
    """--peers and --venvs; `kept`: what of the peers lies there."""
    names = list(peers)
    parser.add_argument(
        "--peers", nargs="+", choices=names, default=names, metavar="PEER",
        help="any of: " + ", ".join(names),
    )  # fmt: skip
    parser.add_argument(
        "--venvs", type=Path, default=cache_root(),
        help=f"where the peers' {kept} are kept (default: %(default)s)",
    )  # fmt: skip


def parse_with_at_least_one(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, *options: str
) -> argparse.Namespace:
    """The arguments; the numbers named by `options` must be 1 or more."""
    given = parser.parse_args(words)
    for option in options:
        if getattr(given, option) < 1:
            parser.error(f"--{option}={getattr(given, option)}: at least 1 is needed")
    return given
