"""What a start in run_dir would go on from, or refuse, and whether there is room for what it saves.

Says what `pretrain.checkpoint` would say, in its words. Imports neither torch nor megatron-core.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.run_folders import runs_below
from launch.check_data import DataFacts
from launch.check_paths import path_of
from launch.findings import Findings
from models.parameter_count import parameter_count
from parallel.checkpoint_manifest import MISSING
from parallel.checkpoint_reader import OPTIMIZER_PREFIX, CheckpointReader
from pretrain.checkpoint_list import (
    find_checkpoints,
    is_unverifiable,
    others,
    problems_of,
    settings_file,
    step_of,
    structural_problems,
)
from pretrain.config import PretrainConfig
from pretrain.run_identity import (
    ALL_PARTS,
    DAMAGED_SUFFIX,
    FORMAT,
    changed_settings,
    identity,
    identity_problem,
    none_sound,
    plain_values_problem,
    start_problem,
)
from pretrain.run_lock import held_by, unusable
from pretrain.train_state import TrainState

TOPIC = "checkpoints"


def check_checkpoints(config: PretrainConfig, data: DataFacts, findings: Findings) -> None:
    """What the run would resume or load, and what it would say to that.

    Raises OSError and RuntimeError for a run_dir that cannot be looked at.
    """
    run_dir = Path(config.run_dir).expanduser()
    if unwritable := unusable(run_dir):
        findings.errors(TOPIC, [unwritable])
        return
    findings.warnings(TOPIC, _held(run_dir))
    existing, damaged = _existing(run_dir / "checkpoints")
    if problem := start_problem(config.checkpoint, run_dir / "checkpoints", existing, damaged):
        findings.errors(TOPIC, [problem])
    elif existing:
        _check_resume(config, data, existing, damaged, findings)
    if config.checkpoint.load and existing:
        findings.warnings(
            TOPIC,
            [
                f"checkpoint.load={config.checkpoint.load} is not used: {run_dir} holds "
                f"{existing[-1].name}, and the run goes on from that; choose another run_dir to "
                "start from the other's weights"
            ],
        )
    elif config.checkpoint.load:
        with path_of("checkpoint.load", config.checkpoint.load, findings):
            _check_load(config, data, findings)


def _held(run_dir: Path) -> list[str]:
    holder = held_by(run_dir)
    if holder is None:
        return []
    return [
        f"run_dir={run_dir} is being written by {holder}; let that run end, stop it, or choose "
        "another run_dir"
    ]


def _existing(folder: Path) -> tuple[list[Path], list[str]]:
    """Folders of steps, oldest first, and names of those set aside, as a resume lists them."""
    if not folder.is_dir():
        return [], []
    found = [path for path in folder.iterdir() if path.is_dir()]
    steps = sorted((path for path in found if step_of(path) >= 0), key=step_of)
    return steps, sorted(path.name for path in found if DAMAGED_SUFFIX in path.name)


def _check_resume(
    config: PretrainConfig,
    data: DataFacts,
    existing: list[Path],
    damaged: list[str],
    findings: Findings,
) -> None:
    for path in reversed(existing):
        problems = _damage(path)
        if problems:
            damaged.append(path.name)
            findings.warnings(
                TOPIC,
                [
                    f"{path} is damaged: {'; '.join(problems[:3])}; a run would set it aside and "
                    "take the one before: put it back from a copy if there is one"
                ],
            )
            continue
        _check_sound(config, data, path, findings)
        return
    findings.errors(TOPIC, [none_sound(existing[-1].parent, damaged)])


def _damage(path: Path) -> list[str]:
    """What is wrong with its files and its index; sizes are compared, no tensor is read."""
    problems = problems_of(path, checksums=False)
    if problems == [MISSING] and is_unverifiable(path, problems):
        problems = []
    return problems or structural_problems(path)


def _check_sound(config: PretrainConfig, data: DataFacts, path: Path, findings: Findings) -> None:
    reader = CheckpointReader(path)
    stored = reader.plain
    state = stored.get("train_state") or {}
    saved = stored.get("identity") or {}
    now = identity(config, data.vocab_size or 0, _stream(config, data, saved.get("data") or {}))
    wanted = {"format": FORMAT, "train_state": TrainState().to_dict(), "identity": now}
    if problem := plain_values_problem(stored, wanted, path):
        findings.errors(TOPIC, [problem])
    parts = _comparable(data)
    consumed = state.get("consumed_sequences", 0)
    problem = identity_problem(saved, now, path, parts, consumed)
    findings.errors(TOPIC, [problem] if problem else [])
    if not problem and data.vocab_size is not None:
        findings.errors(TOPIC, _incomplete(config, data.vocab_size, reader, with_optimizer=True))
    step, steps = int(state.get("step", step_of(path))), config.train.train_steps
    if step >= steps:
        findings.warnings(
            TOPIC,
            [
                f"train.train_steps={steps} is reached: {path} is of step {step}, and nothing is "
                f"left to train; use train.train_steps={2 * step}, or another run_dir"
            ],
        )
    elif not problem:
        findings.notes(
            TOPIC, [f"the run goes on from {path}, step {step:,} of train.train_steps={steps}"]
        )
    if not problem:
        _tell_changes(config, data, path, findings)
    leftovers = [f"{folder}: {what}" for folder, what in others(path.parent).items()]
    findings.notes(TOPIC, leftovers)


def _stream(config: PretrainConfig, data: DataFacts, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fingerprint of the stream of samples; as far as it is not known, what was saved."""
    if data.fingerprint is not None or not saved:
        return data.fingerprint or {}
    known = {
        "seq_length": config.seq_length,
        "seed": config.data.seed,
        "packing": config.data.packing.fingerprint(),
    }
    return {**saved, **{name: value for name, value in known.items() if name in saved}}


def _comparable(data: DataFacts) -> tuple[str, ...]:
    known = {
        "model": data.vocab_size is not None,
        "data": True,
        "train": True,
    }
    return tuple(part for part in ALL_PARTS if known[part])


def _incomplete(
    config: PretrainConfig, vocab_size: int, reader: CheckpointReader, *, with_optimizer: bool
) -> list[str]:
    """Whether as many weights are in the files as the model has, experts among them."""
    count = parameter_count(config.model, vocab_size).total
    stored = sum(tensor.numel for tensor in reader.weights.values())
    if stored < count:
        return [
            f"{reader.folder} holds {stored:,} of the {count:,} parameters of "
            f"{config.model.name}: parts of it were not saved; use another checkpoint"
        ]
    has_optimizer = any(name.startswith(OPTIMIZER_PREFIX) for name in reader.tensors)
    if with_optimizer and not has_optimizer:
        return [
            f"{reader.folder} holds no optimizer state, so a run cannot go on from it; start a new "
            f"run from its weights: checkpoint.load={reader.folder} with another run_dir"
        ]
    return []


def _tell_changes(config: PretrainConfig, data: DataFacts, path: Path, findings: Findings) -> None:
    """Settings that differ from those the checkpoint was made with: a resume allows them, but for
    some of the data's, which are known only where the stream of samples is."""
    file = settings_file(path)
    changed = changed_settings(config, file) if file is not None else []
    of_data = [one for one in changed if one.startswith("data.") and data.fingerprint is None]
    allowed = [one for one in changed if one not in of_data]
    if allowed:
        text = f"changed since {file}, which a resume allows: {', '.join(allowed)}"
        findings.notes(TOPIC, [text])
    if of_data:
        text = f"changed since {file}: {', '.join(of_data)}; whether a resume allows that is known "
        text += "when the text is tokenized and packed: the run may be refused"
        findings.warnings(TOPIC, [text])


def _check_load(config: PretrainConfig, data: DataFacts, findings: Findings) -> None:
    load = config.checkpoint.load
    found = find_checkpoints(Path(load))
    if not found:
        home = Path(load).expanduser()
        at_home = home != Path(load) and find_checkpoints(home)
        hint = f"; write {home}" if at_home else runs_below(load)
        findings.errors(
            TOPIC,
            [
                f"checkpoint.load={load}: no complete checkpoint is there{hint or '; name '}"
                + ("" if hint else "a run folder, its checkpoints folder, or one of those in it")
            ],
        )
        return
    path = found[-1]
    if problems := _damage(path):
        findings.errors(
            TOPIC,
            [
                f"checkpoint.load={load}: {path} is damaged: {'; '.join(problems[:5])}. Name "
                "another checkpoint; this one was left as it is"
            ],
        )
        return
    if data.vocab_size is None:
        return
    reader = CheckpointReader(path)
    now = identity(config, data.vocab_size, {})
    problem = identity_problem(reader.plain.get("identity") or {}, now, path, ("model",), 0)
    findings.errors(TOPIC, [f"checkpoint.load={load}: {problem}"] if problem else [])
    if not problem:
        incomplete = _incomplete(config, data.vocab_size, reader, with_optimizer=False)
        findings.errors(TOPIC, incomplete)
        findings.notes(TOPIC, [f"the run starts from the weights of {path}"] * (not incomplete))
