"""Loads an exported folder as its users will, and writes down what it computes.

    python -P read_back.py FOLDER REQUEST.json ANSWER.pt

A process of its own, which imports torch and transformers only: it shows that the folder needs
nothing of the program that made it, and runs a torch that nobody changed (`parallel.cpu_bridge`).

Request: ids [[...]], prompt [...], new_tokens, text, seed. Answer: logits [b, s, v] in fp32, greedy
ids, ids of the text as the folder's tokenizer has them (None without), versions, imported files.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    import transformers

    folder, request_file, answer_file = sys.argv[1:]
    request = json.loads(Path(request_file).read_text())
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    torch.manual_seed(request["seed"])
    logits = model(torch.tensor(request["ids"])).logits
    greedy: list[int] = []
    if request["new_tokens"]:
        prompt = torch.tensor([request["prompt"]])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request["new_tokens"],
            min_new_tokens=request["new_tokens"],
            do_sample=False,
        )
        greedy = output[0, prompt.shape[1] :].tolist()
    answer: dict[str, Any] = {
        "logits": logits.float(),
        "greedy": greedy,
        "text_ids": _encode(folder, request["text"]),
        "class": type(model).__name__,
        "versions": {m.__name__: str(m.__version__) for m in (torch, transformers)},
        "imported": [
            str(module.__file__)
            for module in list(sys.modules.values())
            if getattr(module, "__file__", None)
        ],
    }
    torch.save(answer, answer_file)


def _encode(folder: str, text: str) -> list[int] | None:
    import transformers

    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
