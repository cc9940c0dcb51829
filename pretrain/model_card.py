"""README.md of an exported model: what it is, where it comes from, how to load it."""

from __future__ import annotations

from typing import Any

from pretrain.config import PretrainConfig

_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
ids = tokenizer("The page you", add_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```"""


def model_card(report: dict[str, Any], config: PretrainConfig) -> str:
    """Markdown with the header that model hubs read; `report` as `pretrain.export` makes it."""
    own_code = report["architecture"] == "magneto"
    parts = [
        _header(config),
        f"# {report['name']}\n\n{_what(config, own_code)}",
        _LOAD.format(trust=", trust_remote_code=True" if own_code else ""),
        "## Origin\n\n" + _origin(report),
        "## Agreement with the checkpoint\n\n" + _agreement(report["check"]),
        "## Notes\n\n" + "\n".join(f"- {note}" for note in _notes(report, config)),
    ]
    return "\n\n".join(parts) + "\n"


def _header(config: PretrainConfig) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if config.data.languages:
        lines += ["language:", *(f"  - {code}" for code in config.data.languages)]
    return "\n".join([*lines, "---"])


def _what(config: PretrainConfig, own_code: bool) -> str:
    model = config.model
    text = (
        f"A decoder-only language model of {model.num_layers} layers, width {model.hidden_size}, "
        f"{model.num_attention_heads} heads, feed-forward width {model.ffn_hidden_size}, "
        f"for up to {model.max_position_embeddings} tokens. Layer norms: "
        f"{model.layer_norm_placement.value}; positions: {model.position_embedding_type.value}"
    )
    if model.moe.num_experts:
        text += (
            f"; {model.moe.num_experts} experts ({model.moe.router.value} router, "
            f"{model.moe.router_topk} a token)"
        )
    if own_code:
        return text + ". No architecture in transformers computes this; `modeling_magneto.py` does."
    return text + ". It is one of transformers' own architectures, and needs no code of its own."


def _origin(report: dict[str, Any]) -> str:
    source = report["source"]
    rows = {
        "checkpoint": source["checkpoint"],
        "optimizer steps": source["step"],
        "tokens trained on": f"{source['tokens']:,}" if source["tokens"] is not None else None,
        "loss": ", ".join(f"{kind} {loss:.4f}" for kind, loss in (source["loss"] or {}).items()),
        "code": source["git"],
        "trained with": ", ".join(f"{n} {v}" for n, v in source["trained_with"].items()),
        "tokenizer (sha256 of its content)": source["tokenizer"],
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n\nChecksums: `export_report.json`."


def _agreement(check: dict[str, Any] | None) -> str:
    if check is None:
        return "Not checked: exported with --no-check."
    versions = ", ".join(f"{name} {version}" for name, version in check["versions"].items())
    text = (
        f"Logits of {check['tokens']} tokens in fp32, as {check['loaded_as']} ({versions}), are at "
        f"most {check['max_abs_difference']:.2g} from those of the program that trained it; the "
        f"largest logit is {check['largest_logit']:.3g}."
    )
    if check["greedy_tokens"]:
        text += f" {check['greedy_tokens']} tokens continued greedily are the same."
    return text


def _notes(report: dict[str, Any], config: PretrainConfig) -> list[str]:
    notes = [
        "Texts were trained with the end-of-text token behind each, and nothing in front: encode "
        "prompts with `add_special_tokens=False`. A prompt may begin with that token.",
    ]
    if "tokenizer.json" in report["files"]:
        notes.append(
            "In training a text that spells out a special token was text; transformers reads it as "
            "the token."
        )
    else:
        notes.append("The tokenizer is not one of transformers'; its file is here as it was.")
    if config.model.moe.num_experts:
        notes.append(
            "Routers choose as in evaluation: no token is dropped and nothing is sampled, but for "
            "TorchScale's gates. Balance losses are not part of this model."
        )
    return notes
