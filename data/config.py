"""Settings of the data room: which text, which tokenizer, which languages at which ratios.

Imports neither torch nor numpy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from data.packing_config import PackingConfig
from data.sampling_weights import explicit


class Weighting(Enum):
    """How language families are weighted against each other."""

    proportional = "proportional"  # by size
    temperature = "temperature"  # by size ** alpha
    uniform = "uniform"
    ratios = "ratios"  # as given
    unimax = "unimax"  # of languages: as uniform as max_epochs allows (arXiv 2304.09151)
    scaling_law = "scaling_law"  # the law's optimum for fitted exponents (arXiv 2410.12883)


class WithinFamily(Enum):
    """How the languages of a family share its samples."""

    proportional = "proportional"  # by size, which leaves the family's own distribution as it is
    temperature = "temperature"  # by size ** within_family_alpha
    uniform = "uniform"
    shares = "shares"  # as given in language_shares


class RatioUnit(Enum):
    """What ratios and sizes count. Sampling itself is by sequences of tokens."""

    tokens = "tokens"
    characters = "characters"
    bytes = "bytes"


class WhenExhausted(Enum):
    """What happens when a language has been drawn max_epochs times."""

    repeat = "repeat"  # nothing: the cap is only reported, by data.plan
    redistribute = "redistribute"  # to its family, by their shares; a family used up: to all others
    stop = "stop"  # the data, and with it the run, ends there


class Verify(Enum):
    """What a run checks of its token stores before it starts."""

    quick = "quick"  # sizes, headers, counts: milliseconds
    full = "full"  # every checksum: reads all stores once
    none = "none"


@dataclass(kw_only=True)
class RatioRule:
    """Sampling ratios: of families, and of the languages within each."""

    weighting: Weighting = Weighting.temperature
    alpha: float = 0.7  # exponent of temperature sampling, 1/T (XLM-E's 0.7)
    # family -> ratio, with weighting=ratios; names every family of the data
    ratios: dict[str, float] = field(default_factory=dict)
    normalize: bool = False  # divide ratios by their sum instead of refusing another than 1
    # family -> γ, with weighting=scaling_law
    gamma: dict[str, float] = field(default_factory=dict)
    # family -> w·L* with weighting=scaling_law; none: the same for all
    losses: dict[str, float] = field(default_factory=dict)
    budget: float | None = None  # with weighting=unimax: what the planned run draws, in the unit
    within_family: WithinFamily = WithinFamily.proportional
    within_family_alpha: float = 0.7  # with within_family=temperature
    # language -> share of its family, with within_family=shares; sums to 1 in every family
    language_shares: dict[str, float] = field(default_factory=dict)
    drop_languages: list[str] = field(default_factory=list)  # not drawn, as if they had no text

    def problems(self, setting: str, max_epochs: float | None) -> list[str]:
        """Broken rules; `setting` is how the user wrote this rule, such as data.mixture."""
        found = []
        for name in ("alpha", "within_family_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                found.append(
                    f"{setting}.{name}={value}: must be a number of at least 0 (0: uniform, 1: "
                    "proportional to size)"
                )
        for name, owner in (
            ("ratios", Weighting.ratios),
            ("gamma", Weighting.scaling_law),
            ("losses", Weighting.scaling_law),
            ("budget", Weighting.unimax),
        ):
            if getattr(self, name) and self.weighting is not owner:
                found.append(
                    f"{setting}.{name} is given with {setting}.weighting={self.weighting.value}, "
                    f"which would ignore it; set {setting}.weighting={owner.value} or remove it"
                )
        if self.weighting is Weighting.ratios:
            try:
                explicit(self.ratios, normalize=self.normalize, setting=f"{setting}.ratios")
            except ValueError as error:
                found.append(str(error))
        if self.weighting is Weighting.scaling_law:
            found += _not_positive(f"{setting}.gamma", self.gamma)
            found += _not_positive(f"{setting}.losses", self.losses)
            if not self.gamma:
                found.append(
                    f"{setting}.weighting=scaling_law needs {setting}.gamma, the fitted exponent "
                    'of every family, e.g. "{germanic: 0.08, indic: 0.15}"'
                )
        if self.weighting is Weighting.unimax:
            if self.budget is None or not (math.isfinite(self.budget) and self.budget > 0):
                found.append(
                    f"{setting}.budget={self.budget}: weighting=unimax needs what the planned run "
                    "draws, such as train_steps x global_batch_size x seq_length tokens"
                )
            if self.within_family is not WithinFamily.proportional:
                found.append(
                    f"{setting}.within_family={self.within_family.value}: weighting=unimax weighs "
                    "languages itself; leave within_family out"
                )
            if max_epochs is None:
                found.append(
                    "data.mixture.max_epochs=null: weighting=unimax needs the most passes over a "
                    "language; use data.mixture.max_epochs=4"
                )
        shares = self.within_family is WithinFamily.shares
        if shares != bool(self.language_shares):
            found.append(
                f"{setting}.within_family={self.within_family.value} and {setting}.language_shares"
                f"={self.language_shares}: shares need both, anything else neither"
            )
        return found


def _not_positive(setting: str, values: Mapping[str, float]) -> list[str]:
    return [
        f"{setting}.{name}={value} must be a finite number above 0"
        for name, value in values.items()
        if not (math.isfinite(value) and value > 0)
    ]


@dataclass(kw_only=True)
class MixtureStage(RatioRule):
    """A rule that takes over at some point of the run. Nothing is inherited from the one before."""

    from_tokens: int = 0  # consumed by then; rounded to whole sequences
    ramp_tokens: int = 0  # the change is linear over so many tokens; 0: at once


@dataclass(kw_only=True)
class MixtureConfig(RatioRule):
    """The rule a run starts with, and what changes on the way."""

    unit: RatioUnit = RatioUnit.tokens
    max_epochs: float | None = None  # passes over each language; None: no cap
    language_max_epochs: dict[str, float] = field(default_factory=dict)  # exceptions to it
    when_exhausted: WhenExhausted = WhenExhausted.repeat
    # rules that take over on the way, in order; the table below
    stages: list[MixtureStage] = field(default_factory=list)
    # a fitted law (data/scaling_law/law.py) to hold measured losses against; changes no ratio
    law: str = ""

    def __post_init__(self) -> None:
        found = self.problems("data.mixture", self.max_epochs)
        if self.max_epochs is not None:
            broken = _not_positive("data.mixture", {"max_epochs": self.max_epochs})
            found += [
                f"{text}, or null for no limit; use data.mixture.max_epochs=4" for text in broken
            ]
        found += _not_positive("data.mixture.language_max_epochs", self.language_max_epochs)
        end = 0
        for number, stage in enumerate(self.stages):
            setting = f"data.mixture.stages[{number}]"
            found += stage.problems(setting, self.max_epochs)
            if stage.ramp_tokens < 0:
                found.append(f"{setting}.ramp_tokens={stage.ramp_tokens}: must be at least 0")
            if stage.from_tokens < max(end, 1):
                found.append(
                    f"{setting}.from_tokens={stage.from_tokens}: must come after the ramp of the "
                    f"stage before has ended, so be at least {max(end, 1)}"
                )
            end = stage.from_tokens + stage.ramp_tokens + 1
        if found:
            raise ValueError("\n".join(found))

    def rules(self) -> list[tuple[int, int, RatioRule]]:
        """(from_tokens, ramp_tokens, rule) of the start and of every stage."""
        return [(0, 0, self), *((s.from_tokens, s.ramp_tokens, s) for s in self.stages)]


@dataclass(kw_only=True)
class DataConfig:
    """Empty paths mean the text and tokenizer that ship with the package."""

    # files of documents, or a folder of them: JSONL (.gz, .zst), Parquet, text (docs/data.md)
    corpus: str = ""
    tokenizer: str = ""  # a Hugging Face tokenizer.json
    eod_token: str = ""  # the token that ends a document; empty: <|endoftext|>, </s> or the like
    store_dir: str = ""  # folder of ready token stores; overrides corpus
    # where stores of a corpus are kept; empty: the user's cache folder
    cache_dir: str = (
        ""  # where token stores are built from the corpus; empty: the user's cache folder
    )
    languages: list[str] = field(default_factory=list)  # empty: every language of the corpus
    # which languages make a family: branch, stock, one_each, five_families or a YAML file
    families: str = "branch"
    seq_length: int | None = None  # tokens; None: the model's max_position_embeddings
    validation_fraction: float = 0.05  # of documents, by hash of doc_id shared across languages
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    seed: int = 1234  # of the order of sequences within each language
    verify: Verify = Verify.quick  # of the token stores, before the run
    prefetch: int = 2  # steps read ahead by a thread; 0: none

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
        for name in ("seed", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least 0")
