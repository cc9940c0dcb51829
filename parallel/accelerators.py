"""Optional accelerator packages: which are here, what each is used for, and how to get it.

None of them is required, and none is imported to find out: only their files and metadata are
looked at, so that asking costs milliseconds and cannot fail on a broken CUDA build. Imports
neither torch nor megatron-core; parallel/fast_paths.py says what a process really uses.

docs/accelerators.md is made of the tables here: `python -m parallel.accelerators`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

from parallel.fast_paths import FAST_PATHS, WITH_DEEPSPEED


class ApexTrap(ImportError):
    """The `apex` that would be imported is not NVIDIA's."""


@dataclass(frozen=True)
class Accelerator:
    """One optional package, as found on this machine."""

    name: str  # the name it is imported by
    found: bool
    version: str | None  # None: not found, or installed without metadata
    used_for: str  # what runs through it where it is found; empty: it is reported and not used
    not_used_for: str  # what it also has, and what does that work here
    how_to_get: str
    compiled: dict[str, bool] = field(default_factory=dict)  # its extensions: whether built
    compiles_later: bool = False  # those that are not built, at the first start that uses them
    problem: str | None = None  # why something of that name is here and still not usable

    def describe(self) -> str:
        """One line for the log."""
        if self.problem:
            return f"{self.name}: unusable, {self.problem}"
        if not self.found:
            wanted = (
                f"would do {self.used_for}" if self.used_for else f"not used: {self.not_used_for}"
            )
            return f"{self.name}: not here; {wanted}; {self.how_to_get}"
        wanted = f"does {self.used_for}" if self.used_for else f"not used: {self.not_used_for}"
        missing = [name for name, built in self.compiled.items() if not built]
        built = f"; without its compiled {', '.join(missing)}" if missing else ""
        if missing and self.compiles_later:
            built = f"; compiled at the first start that uses them: {', '.join(missing)}"
        return f"{self.name}: {self.version or 'version unknown'} ({wanted}{built})"


@dataclass(frozen=True)
class _Known:
    name: str
    distribution: str
    parts: tuple[str, ...]  # modules that must be there for it to be the real thing
    used_for: str
    not_used_for: str
    how_to_get: str
    tested: str  # which of its uses are compared with torch's, by which test, where it is there
    extensions: tuple[str, ...] = ()  # of which some may be there and some not
    compiles_later: bool = False  # those that are not there, where there is a compiler


_KNOWN = (
    _Known(
        "apex",
        "apex",
        ("apex.optimizers", "amp_C"),
        "AdamW, gradient norm and clipping where Transformer Engine is not here, and weight"
        " gradients of megatron-core's linear layers",
        "its LayerNorm: the norms are torch's",
        "build it from https://github.com/NVIDIA/apex with --cpp_ext and --cuda_ext;"
        " `pip install apex` installs something else",
        "AdamW, by `pytest -m gpu tests/parallel/test_fast_paths.py`; norm, clipping and weight"
        " gradients by no test of their own, but by every `pytest -m gpu` that trains beside it",
        ("fused_weight_gradient_mlp_cuda",),
    ),
    _Known(
        "transformer_engine",
        "transformer_engine",
        ("transformer_engine.pytorch",),
        "AdamW, gradient norm and clipping, and the splitting of queries, keys and values",
        "its layers, its attention and FP8: layers are megatron-core's plain ones and ours",
        "pip install 'transformer_engine[pytorch]'",
        "AdamW, by `pytest -m gpu tests/parallel/test_fast_paths.py`; norm, clipping and splitting"
        " by no test of their own, but by every `pytest -m gpu` that trains beside it",
    ),
    _Known(
        "flash_attn",
        "flash_attn",
        ("flash_attn.flash_attn_interface",),
        "",
        "attention is torch's, which has flash kernels of its own",
        "pip install flash-attn --no-build-isolation",
        "nothing to test",
    ),
    _Known(
        "triton",
        "triton",
        ("triton.language",),
        "what torch.compile makes of activations, biases, residuals and norms of sharded widths"
        " on a GPU",
        "anything else here",
        "comes with torch's CUDA builds for Linux",
        "the same functions compiled by a C++ compiler, by `tests/parallel/test_compiled.py`; by"
        " Triton, by `pytest -m gpu tests/parallel/test_compiled.py`",
    ),
    _Known(
        "deepspeed",
        "deepspeed",
        ("deepspeed.runtime",),
        "the reduction of gradients and the optimizer, sharded or in host memory, under"
        " engine=deepspeed",
        "engine=megatron",
        "pip install 'magnetron[deepspeed]'",
        "ZeRO and torch's AdamW on a CPU, by `tests/parallel/test_deepspeed_engine.py`; its CPU"
        " Adam, compiled there, by `tests/parallel/test_deepspeed_adam.py` (slow); its FusedAdam,"
        " which needs a GPU, by none",
        ("fused_adam", "cpu_adam"),
        compiles_later=True,
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
    compiled = {}
    if present := _spec(known.name) is not None:
        absent = [part for part in known.parts if _spec(part) is None]
        if known.name == "apex" and "apex.optimizers" in absent:
            problem = _apex_problem()
        elif absent:
            problem = f"{' and '.join(absent)} missing from it: {known.how_to_get}"
        else:
            compiled = _extensions(known)
    return Accelerator(
        name=known.name,
        found=present and problem is None,
        version=_version(known.distribution) if present else None,
        used_for=known.used_for,
        not_used_for=known.not_used_for,
        how_to_get=known.how_to_get,
        compiled=compiled,
        compiles_later=known.compiles_later,
        problem=problem,
    )


def _extensions(known: _Known) -> dict[str, bool]:
    """Which of the package's extensions were compiled when it was installed."""
    if known.name == "deepspeed":
        built = _deepspeed_ops()
        return {name: built.get(name, False) for name in known.extensions}
    return {name: _spec(name) is not None for name in known.extensions}


def _deepspeed_ops() -> dict[str, bool]:
    """What DeepSpeed wrote down when it was installed; empty where it cannot be read. What is not
    built ahead is compiled at the first start that uses it, where there is a compiler."""
    spec = _spec("deepspeed.git_version_info_installed")
    if spec is None or spec.origin is None:
        return {}
    for statement in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == (
            "installed_ops"
        ):
            return dict(ast.literal_eval(statement.value))
    return {}


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


def markdown() -> str:
    """docs/accelerators.md."""
    lines = [
        "# Accelerators",
        "",
        "Made by `python -m parallel.accelerators > docs/accelerators.md`; edit",
        "`parallel/accelerators.py`.",
        "",
        "Everything runs on plain torch. Some optional packages are used where they are installed;",
        "a run's log says which, and what the others would do. They are found without importing",
        "them, and none changes a result by more than rounding. No speed is claimed for any of",
        "them: none has been measured in this project.",
        "",
        "## Who does what",
        "",
        "The first that is there is used.",
        "",
        "| work | on a GPU | on a CPU |",
        "|---|---|---|",
    ]
    for path in FAST_PATHS.values():
        lines.append(f"| {path.work} | {_choices(path.on_gpu)} | {_choices(path.on_cpu)} |")
    lines += [
        "",
        "With `engine=deepspeed` these differ, and its log says which of them it is, on a CPU too:",
        "",
        "| work | who |",
        "|---|---|",
    ]
    lines += [f"| {work} | {_choices(who)} |" for work, who in WITH_DEEPSPEED.items()]
    lines += [
        "",
        "## torch.compile",
        "",
        "`parallel.compile_elementwise=auto`, the default, compiles on a GPU where Triton works,",
        "and not on a CPU; `always` refuses to start where it does not work; `never` compiles",
        "nothing.",
        "Before the model is built every rank compiles two small functions, one of them in bf16",
        "with its gradients, and compares what they give; where one cannot, none compiles, and",
        "the log says why. On a CPU it gains a twentieth",
        "of a step or less ([benchmarks.md](benchmarks.md#compiled-activations-and-norms)), and",
        "costs the first start 10 s or more, so there it has to be asked for; on a GPU it has",
        "not been measured. Matrix products, attention and LayerNorm are not compiled: torch's",
        "kernels for them leave nothing to gain. Experts are not either: their numbers of rows",
        "change.",
        "",
        "## The packages",
        "",
        "| package | what it does here | what it is not used for | tested where it is there |"
        " how to get it |",
        "|---|---|---|---|---|",
    ]
    for known in _KNOWN:
        used = known.used_for or "reported, not used"
        if known.extensions:
            used += f" (compiled: {', '.join(f'`{name}`' for name in known.extensions)})"
        columns = (f"`{known.name}`", used, known.not_used_for, known.tested, known.how_to_get)
        lines.append(f"| {' | '.join(columns)} |")
    lines += [
        "",
        "`pip install apex` installs an unrelated package of that name. megatron-core would take",
        "it for NVIDIA's and fail far from the cause, so a run refuses to start beside it.",
        "",
        "DeepSpeed's operations are compiled when it is installed (`DS_BUILD_OPS=1`) or at the",
        "first start that uses them, where there is a compiler; the log names those that were not",
        "built ahead. How each package is told from what only has its name is tested everywhere,",
        "without the packages (`tests/parallel/test_accelerators.py`).",
    ]
    return "\n".join(lines) + "\n"


def _choices(choices: dict[str, str]) -> str:
    return "; ".join(f"{who}: {how}" for who, how in choices.items())


if __name__ == "__main__":
    print(markdown(), end="")
