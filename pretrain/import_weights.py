"""Weights of another program as a run folder of ours: config.yaml and a checkpoint of step 0.

One process. Memory: the model in fp32, and the foreign weights, memory-mapped (TorchScale) or one
at a time (Megatron-LM). Everything in the file is used, or is known to follow from the settings, or
is named in an error; so is everything that our model lacks. Nothing is loaded in parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from models.build import build_model
from models.config import Activation, ModelConfig, PositionEmbedding
from models.foreign_weights import OUTPUT, Origin, Recipe, not_of_megatron, recipes
from models.initialize import EMBEDDING
from models.moe_config import RouterType, ScoreFunction
from models.parameter_count import padded_vocab_size
from models.xpos import xpos_decay
from parallel import checkpoint_io
from parallel.checkpoint_reader import CheckpointReader, StoredWeights
from parallel.config import ParallelConfig, Precision
from parallel.engine import checkpoint_metadata
from parallel.new_folder import new_folder
from parallel.runtime import initialize, shutdown
from parallel.safe_pickle import ZIP_START, Record, torchs_reason
from pretrain.config import PretrainConfig
from pretrain.run_identity import FORMAT, model_identity
from pretrain.train_state import TrainState

SHOWN = 8  # names in an error
REPORT_FILE = "import.json"


class WeightsError(ValueError):
    """Weights that are not those of the model, with the names."""


@dataclass(frozen=True)
class Foreign:
    """Weights of another program, by its names."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    args: dict[str, Any]  # the settings it was trained with, as far as the file has them


def import_weights(
    origin: Origin,
    path: Path,
    config: PretrainConfig,
    out: Path,
    *,
    rotary_interleaved: bool | None = None,
) -> dict[str, Any]:
    """Write the run folder `out`; returns what is in its import.json.

    Args:
        path: TorchScale: a state dict by torch.save, alone or under "model", names with or without
            "decoder." in front. Megatron-LM: a torch_dist folder (iter_0001000).
        config: with the model that the weights are of. model.vocab_size=None: the embedding's rows;
            a number: there may be more rows if they are padding.
        rotary_interleaved: Megatron-LM's setting; None: what the checkpoint says, else False.

    Raises:
        FileNotFoundError, FileExistsError: there is no `path`, or there is an `out`.
        WeightsError: names or shapes do not fit, the file contradicts the settings, the settings
            are of what Megatron-LM does not have, or the file is a checkpoint of ours.
        ValueError: the file is damaged or not harmless.
    """
    foreign = open_torchscale(path) if origin is Origin.torchscale else open_megatron(path)
    model = replace(
        config.model, vocab_size=config.model.vocab_size or _rows(origin, foreign, path)
    )
    if origin is Origin.megatron:
        _check_megatron_args(foreign.args, model)
        if rotary_interleaved is None:
            rotary_interleaved = bool(foreign.args.get("rotary_interleaved", False))
    with new_folder(out) as partial:
        report = _write(origin, foreign, model, config, partial, bool(rotary_interleaved))
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
        written = replace(config, model=model, run_dir=str(out))
        yaml = OmegaConf.to_yaml(OmegaConf.structured(written))
        (partial / "config.yaml").write_text(yaml)
    return report


def _write(
    origin: Origin,
    foreign: Foreign,
    model: ModelConfig,
    config: PretrainConfig,
    folder: Path,
    rotary_interleaved: bool,
) -> dict[str, Any]:
    assert model.vocab_size is not None
    parallel = ParallelConfig(precision=Precision.fp32)
    runtime = initialize(parallel, seed=0)
    try:
        size = model.vocab_size
        chunk = build_model(model, parallel, runtime, vocab_size=size, seed=0)[0]
        # aliases of the parameters, and the buffers that are saved; None: megatron-core's extras
        targets = {n: t for n, t in chunk.state_dict().items() if torch.is_tensor(t)}
        found = recipes(
            origin, model, targets, foreign.shapes, rotary_interleaved=rotary_interleaved
        )
        derived = _derived(foreign, model)
        _check_names(found, foreign, derived)
        _check_vocabulary(found, foreign, size)
        _fill(targets, found, foreign, size)
        checkpoint_io.save(
            {
                "model0": chunk.sharded_state_dict(metadata=checkpoint_metadata()),
                "format": FORMAT,
                "train_state": TrainState().to_dict(),
                "identity": {"model": model_identity(model, size)},
            },
            folder / "checkpoints" / "step_00000000",
            metadata=checkpoint_metadata(),
        )
    finally:
        shutdown(runtime)
    return {
        "origin": origin.value,
        "rotary_interleaved": rotary_interleaved if origin is Origin.megatron else None,
        "parameters": sum(target.numel() for target in targets.values()),
        "weights": {ours: list(recipe.names) for ours, recipe in found.items()},
        "follow_from_settings": derived,
        "vocabulary": {
            "ours": size,
            "rows": padded_vocab_size(size, model.make_vocab_size_divisible_by),
        },
    }


# ---------------------------------------------------------------- opening


def open_torchscale(path: Path) -> Foreign:
    """A state dict in a file of torch.save, read without running what it may contain."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            raise ValueError(
                f"{path} is not in the format that torch.save has since torch 1.6. If it is of an "
                f"older one, write it anew (torch.save(torch.load({str(path)!r}, "
                "weights_only=True), 'NEW.pt')) and name NEW.pt here; else it is damaged, or "
                "something else"
            )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, ...
        raise ValueError(
            f"{path} cannot be read as weights alone: {torchs_reason(error)}. It must hold a "
            'state dict, alone or under "model", and nothing else: save it again like that with '
            "the program that wrote it"
        ) from None
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds no state dict")
    strangers = [str(name) for name, value in state.items() if not torch.is_tensor(value)]
    if strangers:
        raise WeightsError(f"{path}: these are no tensors: {_few(strangers)}")
    weights = {str(name).removeprefix("decoder."): value for name, value in state.items()}
    return Foreign({n: tuple(w.shape) for n, w in weights.items()}, weights.__getitem__, {})


def open_megatron(path: Path) -> Foreign:
    """A checkpoint of Megatron-LM; its optimizer and its settings' classes are left alone."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder")
    reader = CheckpointReader(path)
    if reader.foreign_plain.keys() >= {"identity", "train_state"}:  # which only our runs write
        raise WeightsError(
            f"{path} is a checkpoint of Magnetron's own and needs no import: start a run from it "
            f"with checkpoint.load={path}; launch.generate and launch.export read it as it is"
        )
    weights = StoredWeights(reader)
    shapes = {
        name: shape
        for name, shape in weights.shapes().items()
        if not name.startswith("chained_")  # optimizers of several parts
    }
    args = reader.foreign_plain.get("args")
    known = args.state if isinstance(args, Record) and isinstance(args.state, dict) else {}
    return Foreign(shapes, weights.read, dict(known))


def _rows(origin: Origin, foreign: Foreign, path: Path) -> int:
    name = "embed_tokens.weight" if origin is Origin.torchscale else EMBEDDING
    if name not in foreign.shapes:
        raise WeightsError(f"{path} has no {name}: it is not a decoder of {origin.value}")
    return foreign.shapes[name][0]


# ---------------------------------------------------------------- comparing names


def _derived(foreign: Foreign, model: ModelConfig) -> list[str]:
    """Foreign tensors that follow from the settings, each compared with what follows."""
    found = []
    for name in foreign.shapes:
        if name.endswith("self_attn.xpos.scale"):
            uses = model.position_embedding_type is PositionEmbedding.xpos
            value = foreign.read(name).double()
            if not uses or value.shape != (model.head_width // 2,):
                continue
            if not torch.allclose(value, xpos_decay(model.head_width), atol=1e-6):
                raise WeightsError(f"{name} is not xPos' decay with γ = 0.4, which ours is")
            found.append(name)
    shared = model.share_embeddings_and_output_weights
    for output, embedding in (
        ("output_projection.weight", "embed_tokens.weight"),
        (OUTPUT, EMBEDDING),
    ):
        if shared and output in foreign.shapes and embedding in foreign.shapes:
            if not torch.equal(foreign.read(output), foreign.read(embedding)):
                raise WeightsError(
                    f"{output} is not {embedding}, and "
                    "model.share_embeddings_and_output_weights=true; set it to false"
                )
            found.append(output)
    return sorted(found)


def _check_names(found: Mapping[str, Recipe], foreign: Foreign, derived: list[str]) -> None:
    used = {name for recipe in found.values() for name in recipe.names}
    missing = sorted(
        f"{ours} (from {lacking[0]}{f' and {len(lacking) - 1} more' * (len(lacking) > 1)})"
        for ours, recipe in found.items()
        if (lacking := [name for name in recipe.names if name not in foreign.shapes])
    )
    unread = sorted(set(foreign.shapes) - used - set(derived))
    problems = [
        f"  {what} ({len(names)}): {_few(names)}"
        for what, names in {"our model lacks": missing, "theirs that nobody reads": unread}.items()
        if names
    ]
    if problems:
        raise WeightsError(
            "these are not the weights of this model:\n"
            + "\n".join(problems)
            + "\nSet the model that they are of (+model=..., model.*=...)."
        )


def _check_vocabulary(found: Mapping[str, Recipe], foreign: Foreign, size: int) -> None:
    """That rows of the embedding and the output are there for `size` ids, and that more of them are
    padding: of Megatron's size (what is in it was never trained), or zero."""
    factors = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    divisors = [foreign.args.get(name) for name in factors]
    padded = None
    if all(isinstance(divisor, int) and divisor > 0 for divisor in divisors):
        padded = padded_vocab_size(size, math.prod(divisors))  # type: ignore[arg-type]
    for name in {EMBEDDING, OUTPUT} & set(found):
        source = found[name].names[0]
        rows = foreign.shapes[source][0]
        if rows < size:
            raise WeightsError(
                f"{source} has {rows} rows, model.vocab_size={size} needs {size}; leave it out to "
                f"take all rows, or set it to {rows} or less"
            )
        if rows not in (size, padded) and foreign.read(source)[size:].any():
            raise WeightsError(
                f"{source} has {rows} rows, and those behind model.vocab_size={size} are no "
                "padding that we know; leave it out to take all rows"
            )


def _fill(
    targets: Mapping[str, Tensor], found: Mapping[str, Recipe], foreign: Foreign, size: int
) -> None:
    problems = []
    with torch.no_grad():
        for name, target in targets.items():
            recipe = found[name]
            try:
                value = recipe.make([foreign.read(source) for source in recipe.names])
            except RuntimeError as error:  # heads that do not divide, experts of several shapes
                problems.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            if name in (EMBEDDING, OUTPUT) and value.shape[1:] == target.shape[1:]:
                # both sides pad the vocabulary, each its way
                target[:size].copy_(value[:size])
                target[size:].zero_()
            elif value.shape == target.shape:
                target.copy_(value)
            else:
                problems.append(f"{name}: {list(value.shape)}, ours is {list(target.shape)}")
    if problems:
        raise WeightsError(
            f"weights of other shapes ({len(problems)}):\n  "
            + "\n  ".join(problems[:SHOWN])
            + "\nSet the model that they are of (+model=..., model.*=...)."
        )


def _check_megatron_args(args: Mapping[str, Any], model: ModelConfig) -> None:
    """What weights do not show: what Megatron-LM does not have, and what the checkpoint says of
    its settings, as far as it does."""
    moe = model.moe
    routers = {
        RouterType.linear: moe.router_score_function,
        RouterType.aux_free: ScoreFunction.sigmoid,
    }
    score_function = routers.get(moe.router)
    positions = {"rope": PositionEmbedding.rope, "none": PositionEmbedding.none}
    ours: dict[str, Any] = {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "norm_epsilon": model.layernorm_epsilon,
        "rotary_base": model.rotary_base,
        "normalization": model.normalization.value,
        "swiglu": model.activation is Activation.swiglu,
        "apply_layernorm_1p": False,
        "squared_relu": False,
        "rotary_percent": 1.0,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "moe_router_topk": moe.router_topk,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        # 1 is none, too
        "moe_router_topk_scaling_factor": (
            1.0 if args.get("moe_router_topk_scaling_factor") == 1 else None
        ),
    }
    problems = not_of_megatron(model)
    if score_function is not None:
        ours["moe_router_score_function"] = score_function.value
        if score_function is ScoreFunction.softmax:
            # over all experts for one (Switch), over those that are asked for several (GShard)
            ours["moe_router_pre_softmax"] = moe.router_topk == 1
    if "position_embedding_type" in args and model.position_embedding_type in positions.values():
        theirs = args["position_embedding_type"]
        if positions.get(theirs) is not model.position_embedding_type:
            problems.append(
                f"position_embedding_type={theirs}, "
                f"model.position_embedding_type={model.position_embedding_type.value}"
            )
    for name, wanted in ours.items():
        if name not in args or (name.startswith("moe_") and not moe.num_experts):
            continue
        theirs = args[name]
        close = isinstance(theirs, int | float) and isinstance(wanted, int | float)
        equal = math.isclose(theirs, wanted, rel_tol=1e-6) if close else theirs == wanted
        if not equal:
            problems.append(f"{name}={theirs}, ours {wanted}")
    if problems:
        raise WeightsError(
            "the checkpoint's settings are not those of this model: " + "; ".join(problems)
        )


def _few(names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
