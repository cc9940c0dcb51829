"""The order of the house: who imports whom, what stays light, and that every YAML composes."""

import ast
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.schema import load
from launch.setting_names import CONF
from pretrain.config_rules import validate

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "parallel": set(),
    "data": set(),
    "models": {"parallel"},
    "pretrain": {"models", "data", "parallel"},
    "launch": {"pretrain", "models", "data", "parallel"},
}
# written against one library, and so the only room to import it
ONLY_IN = {"megatron": "parallel", "apex": "parallel", "transformer_engine": "parallel"}
LIGHT = [
    "parallel.config",
    "parallel.rank_layout",
    "models.config",
    "models.moe_config",
    "models.parameter_count",
    "data.config",
    "pretrain.config",
    "pretrain.config_rules",
    "pretrain.layouts",
    "pretrain.shrink",
    "launch.verify",
    "launch.schema",
    "launch.pretrain",
    "launch.slurm",
    "launch.status",
    "data.corpora.__main__",
]
# the commands of the data room, which need numpy and nothing that takes seconds to import
WITHOUT_TORCH = [
    f"data.{name}"
    for name in ("inspect", "plan", "replay", "tokenize", "tokenizer_report", "train_tokenizer")
] + ["data.verify"]
WITHOUT_TORCH += [
    f"launch.{name}" for name in ("check", "checkpoint", "fit_mixture", "plan", "report", "sweep")
]
HEAVY = ("torch", "megatron", "numpy", "wandb", "tokenizers", "matplotlib")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """First names of all imports of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: say the room's name instead of a relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_the_right_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    names = set(imported(path))
    assert names & (set(ROOMS) - {room} | {"tests", "benchmarks", "conf"}) <= ROOMS[room]
    assert not [name for name in names if ONLY_IN.get(name, room) != room]


def imported_heavy(modules: list[str], heavy: tuple[str, ...]) -> list[str]:
    code = f"import sys, {', '.join(modules)}; print(*(m for m in {heavy} if m in sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return ended.stdout.split()


def test_light_modules_import_nothing_heavy() -> None:
    assert imported_heavy(LIGHT, HEAVY) == []


def test_commands_of_the_data_room_do_without_torch() -> None:
    heavy = ("torch", "megatron", "wandb", "matplotlib", "pyarrow")
    assert imported_heavy(WITHOUT_TORCH, heavy) == []


def shipped(group: str) -> list[str]:
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    assert names
    return names


@pytest.mark.parametrize("name", shipped("model"))
def test_models_compose(name: str) -> None:
    config = load([f"+model={name}"])
    assert config.model.name == name
    validate(config, world_size=8)


@pytest.mark.parametrize("size", ["tiny", "125m", "350m", "1b"])
def test_the_pre_ln_twins_differ_in_nothing_else(size: str) -> None:
    ours, plain = (vars(load([f"+model={kind}_{size}"]).model) for kind in ("magneto", "pre_ln"))
    differ = {name for name in ours if ours[name] != plain[name]}
    assert differ == {"name", "layer_norm_placement", "init_method"}


@pytest.mark.parametrize("name", shipped("parallel"))
def test_layouts_compose(name: str) -> None:
    model = "xmoe_7b_64e" if "ep" in name else "magneto_6_7b"
    config = load([f"+model={model}", f"parallel={name}", "train.global_batch_size=16"])
    sizes = config.parallel
    replica = (
        sizes.tensor_model_parallel_size
        * sizes.context_parallel_size
        * sizes.pipeline_model_parallel_size
    )
    experts = sizes.expert_model_parallel_size * sizes.pipeline_model_parallel_size
    world_size = 2 * math.lcm(replica, experts)
    assert validate(config, world_size).world_size == world_size


@pytest.mark.parametrize("group", ["data", "optimizer"])
def test_other_groups_compose(group: str) -> None:
    for name in shipped(group):
        validate(load(["+model=magneto_tiny", f"{group}={name}"]), world_size=1)


@pytest.mark.parametrize("name", shipped("experiment"))
def test_experiments_compose(name: str) -> None:
    config = load([f"+experiment={name}"])
    validate(config, world_size={"demo": 4, "tiny_cpu": 1}[name])


def test_no_group_of_files_is_left_out() -> None:
    groups = {path.name for path in CONF.iterdir() if path.is_dir() and path.name[0].isalpha()}
    assert groups == {"model", "parallel", "data", "optimizer", "experiment", "cluster", "sweep"}


def test_every_test_folder_is_a_package() -> None:
    """Or `import data` would find tests/data."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]
