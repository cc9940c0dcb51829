"""Optional accelerator packages: which are here, in which version, and what they would bring.

None of them is required, and none is imported to find out: only their files and metadata are
looked at, so that asking costs milliseconds and cannot fail on a broken CUDA build. Imports
neither torch nor megatron-core.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path


class ApexTrap(ImportError):
    """The `apex` that would be imported is not NVIDIA's."""


@dataclass(frozen=True)
class Accelerator:
    """One optional package, as found on this machine."""

    name: str  # the name it is imported by
    found: bool
    version: str | None  # None: not found, or installed without metadata
    brings: str  # what it speeds up or adds
    how_to_get: str
    problem: str | None = None  # why something of that name is here and still not usable

    def describe(self) -> str:
        """One line for the log."""
        if self.problem:
            return f"{self.name}: unusable, {self.problem}"
        if self.found:
            return f"{self.name}: {self.version or 'version unknown'} ({self.brings})"
        return f"{self.name}: not here; would bring {self.brings}; {self.how_to_get}"


@dataclass(frozen=True)
class _Known:
    name: str
    distribution: str
    parts: tuple[str, ...]  # modules that must be there for it to be the real thing
    brings: str
    how_to_get: str


_KNOWN = (
    _Known(
        "apex",
        "apex",
        ("apex.optimizers", "amp_C"),
        "NVIDIA's fused Adam, fused LayerNorm and fused gradient norm on CUDA",
        "build it from https://github.com/NVIDIA/apex with --cpp_ext and --cuda_ext;"
        " `pip install apex` installs something else",
    ),
    _Known(
        "transformer_engine",
        "transformer_engine",
        ("transformer_engine.pytorch",),
        "fused and FP8 layers on CUDA",
        "pip install 'transformer_engine[pytorch]'",
    ),
    _Known(
        "flash_attn",
        "flash_attn",
        ("flash_attn.flash_attn_interface",),
        "FlashAttention kernels beyond those in torch",
        "pip install flash-attn --no-build-isolation",
    ),
    _Known(
        "triton",
        "triton",
        ("triton.language",),
        "torch.compile on CUDA",
        "comes with torch's CUDA builds for Linux",
    ),
    _Known(
        "deepspeed",
        "deepspeed",
        ("deepspeed.runtime",),
        "ZeRO with CPU offload",
        "pip install deepspeed",
    ),
)


def find_accelerators() -> list[Accelerator]:
    """What is here of apex, Transformer Engine, FlashAttention, Triton and DeepSpeed.

    A package whose decisive parts are missing counts as not found, with `problem` saying what is
    wrong. Never raises; see `check_apex` for the one case that must stop a run.
    """
    return [_find(known) for known in _KNOWN]


def check_apex() -> None:
    """Refuse the unrelated `apex` of the package index.

    Several places in megatron-core only test `import apex` and then choose NVIDIA's fused
    LayerNorm, which the wrong package does not have: the model breaks far from the cause.

    Raises:
        ApexTrap: `import apex` works and `apex.optimizers` is not in it.
    """
    if _spec("apex") and not _spec("apex.optimizers"):
        raise ApexTrap(_apex_problem())


def _find(known: _Known) -> Accelerator:
    problem = None
    if present := _spec(known.name) is not None:
        absent = [part for part in known.parts if _spec(part) is None]
        if known.name == "apex" and "apex.optimizers" in absent:
            problem = _apex_problem()
        elif absent:
            problem = f"{' and '.join(absent)} missing from it: {known.how_to_get}"
    return Accelerator(
        name=known.name,
        found=present and problem is None,
        version=_version(known.distribution) if present else None,
        brings=known.brings,
        how_to_get=known.how_to_get,
        problem=problem,
    )


def _apex_problem() -> str:
    spec = _spec("apex")
    where = list(spec.submodule_search_locations or []) if spec else []
    place = Path(where[0]) if where else spec and spec.origin
    return (
        f"the package `apex` at {place} is not NVIDIA's (it has no apex.optimizers), and"
        " megatron-core would mistake it for that; fix: pip uninstall apex"
    )


def _spec(name: str) -> ModuleSpec | None:
    """Where `name` would be imported from. Unlike find_spec alone, imports no parent package."""
    top, *inner = name.split(".")
    spec = find_spec(top)
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
