"""Settings of the data room: which text, which tokenizer, which languages at which ratios.

Imports neither torch nor numpy.
"""

import math
from dataclasses import dataclass, field
from enum import Enum


class Weighting(Enum):
    """How language families are weighted against each other."""

    proportional = "proportional"  # by tokens
    temperature = "temperature"  # by tokens ** alpha
    uniform = "uniform"
    ratios = "ratios"  # as given


@dataclass(kw_only=True)
class MixtureConfig:
    weighting: Weighting = Weighting.temperature
    alpha: float = 0.7  # exponent of temperature sampling, 1/T (XLM-E's 0.7)
    # family -> ratio, with weighting=ratios; normalised to sum 1; names every family of the data
    ratios: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(
                f"data.mixture.alpha={self.alpha}: must be a number of at least 0 "
                "(0: uniform over families, 1: proportional to tokens)"
            )
        if self.weighting is not Weighting.ratios:
            if self.ratios:
                raise ValueError(
                    f"data.mixture.ratios is given with data.mixture.weighting="
                    f"{self.weighting.value}, which would ignore it; set "
                    "data.mixture.weighting=ratios or remove the ratios"
                )
            return
        bad = {f: r for f, r in self.ratios.items() if not (math.isfinite(r) and r >= 0)}
        if bad:
            raise ValueError(
                f"data.mixture.ratios: {bad} must be finite numbers of at least 0 "
                "(0 leaves a family out)"
            )
        if not any(r > 0 for r in self.ratios.values()):
            raise ValueError(
                f"data.mixture.ratios={dict(self.ratios)}: weighting=ratios needs at least one "
                'family with a positive ratio, e.g. "data.mixture.ratios={germanic: 1, slavic: 2}"'
            )


@dataclass(kw_only=True)
class DataConfig:
    """Empty paths mean the text and tokenizer that ship with the package."""

    corpus: str = (
        ""  # JSONL or JSONL.gz file, or a folder of them: {"text", "language", "doc_id"} a line
    )
    tokenizer: str = ""  # a Hugging Face tokenizer.json
    eod_token: str = ""  # the token that ends a document; empty: <|endoftext|>, </s> or the like
    store_dir: str = ""  # folder of ready token stores; overrides corpus
    cache_dir: str = (
        ""  # where token stores are built from the corpus; empty: the user's cache folder
    )
    languages: list[str] = field(default_factory=list)  # empty: every language of the corpus
    seq_length: int | None = None  # tokens; None: the model's max_position_embeddings
    validation_fraction: float = 0.05  # of documents, by hash of doc_id shared across languages
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    seed: int = 1234  # of the order of sequences within each language

    def __post_init__(self) -> None:
        if self.seq_length is not None and self.seq_length < 1:
            raise ValueError(f"data.seq_length={self.seq_length}: must be at least 1 token")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction}: must lie between 0 and 1, "
                "both excluded; 0.05 keeps one document in twenty for validation"
            )
        twice = sorted({code for code in self.languages if self.languages.count(code) > 1})
        if twice:
            raise ValueError(f"data.languages names {', '.join(twice)} more than once")
        if self.seed < 0:
            raise ValueError(f"data.seed={self.seed}: must be at least 0")
