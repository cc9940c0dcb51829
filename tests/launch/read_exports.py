"""Loads exported folders in a process that knows nothing of us, and computes with them.

    python -P read_exports.py FOLDER OUTPUT.pt

Computes the logits of the ids in ``FOLDER/ids.json`` with each folder ``FOLDER/*/out``, and what
`test_export` asks of the one called "xmoe". A clean process: under `parallel.cpu_bridge`
transformers' own rotary positions come out wrong.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    import torch
    import transformers

    torch.set_grad_enabled(False)
    transformers.logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    ids = torch.tensor(json.loads((folder / "ids.json").read_text()))
    answers: dict[str, Any] = {}
    for out in sorted(folder.glob("*/out")):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, trust_remote_code=True
        ).eval()
        torch.manual_seed(0)
        answers[out.parent.name] = model(ids).logits
        if out.parent.name == "xmoe":
            answers["of xmoe"] = more_of(model, ids)
        if out.parent.name == "torchscale top-1":
            answers["continued"] = continued(model, ids[:, :10])
        if out.parent.name == "bf16":
            stored = transformers.AutoModelForCausalLM.from_pretrained(
                out, dtype="auto", trust_remote_code=True
            )
            answers["types"] = {n: str(p.dtype) for n, p in stored.named_parameters()}
    torch.save(answers, sys.argv[2])


def more_of(model: Any, ids: Any) -> dict[str, Any]:
    """In pieces with a cache; behind padding; the last token alone; the loss."""
    import torch

    first = model(ids[:, :8], use_cache=True)
    cache = first.past_key_values
    middle = model(ids[:, 8:19], past_key_values=cache).logits
    last = model(ids[:, 19:], past_key_values=cache).logits
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    return {
        "pieces": torch.cat([first.logits, middle, last], dim=1),
        "padded": model(padded, attention_mask=mask).logits[:, 3:],
        "last": model(ids, logits_to_keep=1).logits,
        "loss": float(model(ids, labels=ids).loss),
        "loss is a mean": not model.accepts_loss_kwargs,
        "generated": model.generate(
            padded[:, :10], attention_mask=mask[:, :10], max_new_tokens=4, do_sample=False
        ),
    }


def continued(model: Any, ids: Any) -> dict[str, Any]:
    """Greedily: by generate() as it is, and by whole forward passes."""
    import torch

    by_hand = ids
    for _ in range(8):
        best = model(by_hand).logits[:, -1:].argmax(-1)
        by_hand = torch.cat([by_hand, best], dim=1)
    mask = torch.ones_like(ids)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    return {"generated": made, "by hand": by_hand}


if __name__ == "__main__":
    main()
