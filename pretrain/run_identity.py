"""What a checkpoint must agree with to be resumed, and what is said where it does not.

Imports neither torch nor megatron-core: a launch is checked with it before there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from data.language_mixture import stream_differences
from models.config import ModelConfig
from pretrain.config import CheckpointConfig, PretrainConfig, Resume
from pretrain.provenance import hide_secret_values

# Of the plain values. 1: the key "format" is missing, and with it what MAY_LACK lists.
FORMAT = 3
# Plain values that checkpoints of an older format do without, by the format.
MAY_LACK = {
    1: {
        *("format", "identity.train"),
        *("train_state.wandb_run_id", "train_state.anomaly", "train_state.unreported"),
    },
    2: {"train_state.unreported"},
}
# Of the identity's "model", what decides how a router's scores become experts and gates.
# Checkpoints from before it was compared lack it.
_OF_GATES = {
    "moe.router_topk",
    "moe.router_score_function",
    "moe.second_expert_policy",
    "moe.normalize_gate_prob_before_dropping",
}
# Keys whose content the engine reads and checks, and what megatron-core notes about itself.
_READ_ELSEWHERE = re.compile(r"model\d+|optimizer|content_metadata")

ALL_PARTS = ("model", "data", "train")  # of the identity
DAMAGED_SUFFIX = ".damaged"  # of checkpoints set aside


def identity(
    config: PretrainConfig, vocab_size: int, data_fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """What a checkpoint must agree with to be resumed: the model's shape, the data stream, and the
    seed of what is drawn in each step."""
    return {
        "model": model_identity(config.model, vocab_size),
        "data": data_fingerprint,
        "train": {"seed": config.train.seed},
    }


def vocabulary_of(model: ModelConfig, needed: int, tokenizer: str) -> int:
    """The model's vocabulary: the tokenizer's (`needed`), or a larger one if the model asks for it.

    Raises ValueError for a smaller one; `tokenizer` is what it is called there.
    """
    wanted = model.vocab_size
    if wanted is not None and wanted < needed:
        raise ValueError(
            f"model.vocab_size={wanted} is smaller than the tokenizer's vocabulary of {needed} "
            f"({tokenizer}); leave it out, or set model.vocab_size={needed} or more"
        )
    return wanted or needed


def model_identity(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What decides about names, shapes and meaning of a model's weights."""
    shape = asdict_plain(model)
    shape["vocab_size"] = vocab_size
    for free_to_change in ("name", "hidden_dropout", "attention_dropout", "init_method_std", "moe"):
        shape.pop(free_to_change)
    moe = model.moe
    if moe.num_experts:  # a dense model's checkpoint knows nothing of experts
        shape |= {
            "moe.num_experts": moe.num_experts,
            "moe.sparse_layers": moe.sparse_layers(model.num_layers),
            "moe.sparse_after_layer": moe.sparse_after_layer,
            "moe.stacked_sublayers": moe.stacked_sublayers,
            "moe.ffn_hidden_size": model.expert_ffn_hidden_size,
            "moe.shared_expert_intermediate_size": moe.shared_expert_intermediate_size,
            "moe.router": moe.router.value,
            "moe.router_dim": moe.dim,
            "moe.router_topk": moe.router_topk,
            # of routers that do not read them these are at their defaults (models.moe_config)
            "moe.router_score_function": moe.router_score_function.value,
            "moe.second_expert_policy": moe.second_expert_policy.value,
            "moe.normalize_gate_prob_before_dropping": moe.normalize_gate_prob_before_dropping,
        }
    return shape


def identity_problem(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    path: Path,
    parts: tuple[str, ...],
    consumed_sequences: int,
) -> str | None:
    """Everything in `parts` in which the two differ; None where nothing does.

    The data may differ in what comes after `consumed_sequences`. "train" (what else decides about
    the steps to come, such as the seed) is compared where it was saved; so is, of the model, what
    earlier versions did not save.
    """
    differences = []
    for part in ("model", "train"):
        if part not in parts or (part == "train" and part not in saved):
            continue
        before, now = saved.get(part, {}), current.get(part, {})
        differences += [
            f"  {part}.{key}: {before.get(key)!r} saved, {now.get(key)!r} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and (key in before or key not in _OF_GATES)
        ]
    if "data" in parts:
        stream = stream_differences(
            saved.get("data", {}), current.get("data", {}), consumed_sequences
        )
        differences += [f"  data: {line}" for line in stream]
    if not differences:
        return None
    return (
        f"{path} was saved by another run; it differs in\n"
        + "\n".join(differences)
        + "\nUse the saved settings, or another run_dir to start a new run."
    )


def start_problem(
    config: CheckpointConfig, folder: Path, existing: list[Path], damaged: list[str]
) -> str | None:
    """Why a run may not start with these checkpoints in its `folder`; None where it may.

    existing: folders of steps, oldest first. damaged: names of those set aside.
    """
    if config.resume is Resume.never and existing:
        return (
            f"checkpoint.resume=never, but {folder} holds {existing[-1].name}; "
            "choose another run_dir, or checkpoint.resume=auto to go on"
        )
    if damaged and not existing:
        return none_sound(folder, damaged)
    if config.resume is Resume.required and not existing:
        return (
            f"checkpoint.resume=required, but {folder} holds no complete checkpoint; "
            "check run_dir, or use checkpoint.resume=auto to start anew"
        )
    return None


def none_sound(folder: Path, damaged: list[str]) -> str:
    """That of all checkpoints of a run none can be gone on from."""
    return (
        f"no sound checkpoint is left in {folder}; damaged: {', '.join(sorted(damaged))}. "
        "Put one back from a copy (without the suffix), or choose another run_dir to start anew; a "
        "new run in this one needs these folders removed by hand"
    )


def plain_values_problem(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path
) -> str | None:
    """What a checkpoint holds and nobody reads, and what it lacks; None where all is well.

    Compares the names that `stored` and `wanted` (what would be saved now) have: those at the top,
    the parts of the identity, and everything in the state of the run.
    """
    written = stored.get("format", 1)
    if written not in {FORMAT, *MAY_LACK}:
        return (
            f"{path} has format {written}; this version knows formats up to {FORMAT}. "
            "Use the version that wrote it."
        )
    saved, now = _names(stored), _names(wanted)
    may_lack = MAY_LACK.get(written, set())
    missing = {name for name in now - saved if not _within(name, may_lack)}
    problems = [
        f"  {kind}: {', '.join(sorted(names))}"
        for kind, names in (("saved, and read by nobody", saved - now), ("missing", missing))
        if names
    ]
    if not problems:
        return None
    return (
        f"{path} does not hold the values this run would go on from:\n"
        + "\n".join(problems)
        + "\nUse the version that wrote it, or start a new run from its weights with "
        "checkpoint.load."
    )


def changed_settings(config: PretrainConfig, file: Path) -> list[str]:
    """Settings in which `config` differs from those in `file` (a run's config.yaml), each as
    "optimizer.lr 0.001 -> 0.0003"; none where the file cannot be read."""
    try:
        before = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(before, dict):
        return []
    written = OmegaConf.to_yaml(OmegaConf.structured(config))  # as runs write it
    was, now = _flat(before), _flat(yaml.safe_load(hide_secret_values(written)))
    return [
        f"{name} {was[name]} -> {now[name]}"
        for name in sorted(was.keys() & now.keys())
        if was[name] != now[name] and name != "run_dir"
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def asdict_plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain values: enums by their value."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return getattr(value, "value", value)

    return plain(asdict(settings))


def _names(values: Mapping[str, Any]) -> set[str]:
    """ "train_state.anomaly.losses" and so on; of the identity its parts, whose content is
    compared by `identity_problem`."""

    def below(prefix: str, inside: Mapping[str, Any]) -> set[str]:
        names: set[str] = set()
        for key, value in inside.items():
            names.add(prefix + key)
            if isinstance(value, dict):
                names |= below(f"{prefix}{key}.", value)
        return names

    kept = {key: value for key, value in values.items() if not _READ_ELSEWHERE.fullmatch(key)}
    identity = kept.get("identity")
    if isinstance(identity, dict):
        kept["identity"] = dict.fromkeys(identity)
    return below("", kept)


def _within(name: str, allowed: set[str]) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)
