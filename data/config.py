"""Settings of the data room: which text, which tokenizer, which languages at which ratios.

Imports neither torch nor numpy.
"""

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
    # family -> ratio, with weighting=ratios; normalised to sum 1, every family of the data must be named
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class DataConfig:
    """Empty paths mean the text and tokenizer that ship with the package."""

    corpus: str = ""  # JSONL or JSONL.gz file, or a folder of them: {"text", "language", "doc_id"} a line
    tokenizer: str = ""  # a Hugging Face tokenizer.json
    store_dir: str = ""  # folder of ready token stores; overrides corpus
    cache_dir: str = ""  # where token stores are built from the corpus; empty: the user's cache folder
    languages: list[str] = field(default_factory=list)  # empty: every language of the corpus
    seq_length: int | None = None  # tokens; None: the model's max_position_embeddings
    validation_fraction: float = 0.05  # of documents, by hash of doc_id shared across languages
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    seed: int = 1234
