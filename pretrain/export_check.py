"""Whether an exported folder computes what the checkpoint computes: same ids, fp32, both ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokenizer import Tokenizer
from models import hugging_face
from models.config import ModelConfig
from models.initialize import global_parameters
from models.moe_config import RouterType, SecondExpertPolicy
from parallel.config import ParallelConfig, Precision
from parallel.megatron import MegatronModule
from parallel.runtime import initialize, shutdown
from pretrain.convert_checkpoint import new_dtype
from pretrain.generate import load_model

SEQUENCES, LENGTH, NEW_TOKENS = 2, 64, 8
# Two programs that compute the same in fp32 differ by rounding: about 1e-6 of the largest logit
# after a few layers, 1e-5 after many. A weight in the wrong place changes logits by their own size.
TOLERANCE = 1e-4
# Of trained models logits are tens. From here on fp32 numbers lie 0.06 apart, and a softmax of such
# has lost what training made.
LARGEST_LOGIT = 1e6
# Words of several scripts, combining marks, digits and white space
TEXT = "Die 3 Häuser,\n naïve  café! Привет, мир. 日本語のテスト สวัสดี किताब مرحبا\t2026"
ROOT = Path(__file__).resolve().parent.parent
_READ_BACK = Path(hugging_face.__path__[0]).resolve() / "read_back.py"


class ExportError(ValueError):
    """An export that would not be what it claims to be."""


@dataclass(frozen=True)
class Check:
    """What was compared, and how far it is apart."""

    tokens: int  # whose logits were compared
    max_abs_difference: float
    largest_logit: float
    greedy_tokens: int  # continued greedily, and equal
    tokenizer_equal: bool | None  # None: the folder's tokenizer is not one of transformers'
    loaded_as: str  # class
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_export(
    checkpoint: Path,
    model: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype | None,
) -> Check:
    """Compare the logits of random ids and a greedy continuation.

    The checkpoint's model is computed here, with its weights rounded to `dtype` if they were; the
    folder's in a process of its own, by transformers.

    Raises ExportError where they differ by more than rounding, or the folder cannot be loaded.
    """
    request = make_request(model)
    answer = read_back(folder, request)
    live = Live(checkpoint, model, dtype)
    try:
        return compare(live, request, answer, tokenizer)
    finally:
        live.close()


def compare(
    live: Live, request: dict[str, Any], answer: dict[str, Any], tokenizer: Tokenizer
) -> Check:
    """What `answer` and the live model agree in. Raises ExportError as `check_export`."""
    ours = [name for name in answer["imported"] if _is_ours(name)]
    if ours:
        raise ExportError(f"the exported folder needs files of this program: {', '.join(ours[:3])}")
    expected = live.logits(request["ids"], request["seed"])
    tokens = expected[..., 0].numel()
    largest = float(expected.abs().max())
    if not largest <= LARGEST_LOGIT:  # NaN is none either
        raise ExportError(
            f"the checkpoint's own logits are no model's: the largest of {tokens} tokens is "
            f"{largest:.3g}; its weights are damaged, or its training had diverged; name an "
            "earlier checkpoint. Nothing was written"
        )
    limit = TOLERANCE * max(1.0, largest)
    difference = float((answer["logits"] - expected).abs().max())
    if not difference <= limit:  # NaN is no match
        raise ExportError(
            f"the exported model is not the checkpoint's: logits of {tokens} tokens differ by "
            f"{difference:.3g}, more than {limit:.1g}; nothing was written"
        )
    equal = _equal_greedily(live, request["prompt"], answer["greedy"], limit)
    ids, wanted = answer["text_ids"], tokenizer.encode(request["text"])
    if ids is not None and ids != wanted:
        raise ExportError(
            f"the exported tokenizer gives {ids[:8]}... for {request['text'][:12]!r}..., the run's "
            f"{wanted[:8]}...; nothing was written"
        )
    return Check(
        tokens=tokens,
        max_abs_difference=difference,
        largest_logit=largest,
        greedy_tokens=equal,
        tokenizer_equal=None if ids is None else True,
        loaded_as=answer["class"],
        versions=answer["versions"],
    )


def make_request(model: ModelConfig) -> dict[str, Any]:
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, model.max_position_embeddings)
    ids = torch.randint(model.vocab_size, (SEQUENCES, length), generator=generator).tolist()
    prompt = ids[0][: max(1, min(length - NEW_TOKENS, length // 2))]
    room = model.max_position_embeddings - len(prompt)
    return {
        "ids": ids,
        "prompt": prompt,
        # what is drawn in evaluation depends on how often it was drawn before
        "new_tokens": 0 if _draws(model) else min(NEW_TOKENS, room),
        "text": TEXT,
        "seed": 0,
    }


def _draws(model: ModelConfig) -> bool:
    moe = model.moe
    gates = moe.router in (RouterType.torchscale, RouterType.torchscale_xmoe)
    drawn = (
        gates and moe.router_topk == 2 and moe.second_expert_policy is not SecondExpertPolicy.all
    )
    return bool(moe.num_experts) and drawn


def read_back(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What models/hugging_face/read_back.py answers. Raises ExportError where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "request.json"), Path(scratch, "answer.pt")
        question.write_text(json.dumps(request))
        ended = subprocess.run(
            [
                sys.executable,
                "-P",
                str(_READ_BACK),
                str(folder.resolve()),
                str(question),
                str(answer),
            ],
            cwd=scratch,
            env=_environment(scratch),
            capture_output=True,
            text=True,
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"the exported folder cannot be loaded: {last}")
        return torch.load(answer, weights_only=True)


def _environment(scratch: str) -> dict[str, str]:
    return os.environ | {
        "HF_HOME": scratch,  # copies of the folder's code go there
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def _is_ours(name: str) -> bool:
    path = Path(name).resolve()
    rooms = ("parallel", "models", "data", "pretrain", "launch")
    return path != _READ_BACK and any(path.is_relative_to(ROOT / room) for room in rooms)


class Live:
    """The checkpoint's own model on this process, in fp32."""

    def __init__(self, checkpoint: Path, model: ModelConfig, dtype: torch.dtype | None) -> None:
        assert model.vocab_size is not None
        self.vocab_size = model.vocab_size
        parallel = ParallelConfig(precision=Precision.fp32)
        self.runtime = initialize(parallel, seed=0)
        self.chunk = load_model(model, parallel, self.runtime, checkpoint)[0]
        with torch.no_grad():
            for name, parameter in global_parameters(self.chunk):
                rounded = new_dtype(name, parameter.dtype, dtype)
                parameter.copy_(parameter.to(rounded).to(parameter.dtype))

    def close(self) -> None:
        shutdown(self.runtime)

    def logits(self, ids: list[list[int]], seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return full_logits(self.chunk, torch.tensor(ids))[..., : self.vocab_size]


@torch.no_grad()
def full_logits(chunk: MegatronModule, tokens: Tensor) -> Tensor:
    """Logits of every token, fp32 [b, s, v], of a model that lies whole on this rank."""
    hidden = chunk.decoder(chunk.embedding(tokens, position_ids=None), attention_mask=None)
    return F.linear(hidden, chunk.output_weight()).transpose(0, 1).float()


def _equal_greedily(live: Live, prompt: list[int], continued: list[int], limit: float) -> int:
    """How many of the tokens `continued` are the likeliest here, too.

    Stops at a tie: of two logits closer than rounding either may be taken.
    """
    ids = list(prompt)
    for count, token in enumerate(continued):
        last = live.logits([ids])[0, -1]
        gap = float(last.max() - last[token])
        if gap > limit:
            raise ExportError(
                f"the exported model continues with token {token} where the checkpoint's has "
                f"{int(last.argmax())}, {gap:.3g} above it; nothing was written"
            )
        if gap > 0:
            return count
        ids.append(token)
    return len(continued)
