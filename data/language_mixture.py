"""Which language and which of its sequences is sample n: a formula of (seed, n), with no index.

    sizes, data.mixture  ->  each language's share of the samples, stage by stage (language_shares)
    shares, epoch caps   ->  x(n), samples asked for before sample n       (data/ratio_schedule.py)
    x(n)                 ->  the language of sample n, and how many of it came before it
                                                                         (data/mixture_schedule.py)
    the k-th sample of a language -> epoch k // sequences, place k % sequences
                         ->  a permutation keyed by (seed, language, epoch) -> the sequence
                                                                         (data/packed_sequences.py)

Every language and family stays within one sample of its exact share at every prefix, so also in
every batch (data/mixture_schedule.py: the few exceptions). Memory and start-up do not depend on how
long the training is, and lengthening a run, or changing what comes later in it, changes nothing
that came before.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import sampling_weights as weights
from data.config import MixtureConfig, RatioRule, RatioUnit, Weighting, WithinFamily
from data.language_families import did_you_mean
from data.mixture_schedule import BLOCK, MixtureSchedule
from data.packed_sequences import PackedSequences, RowReader, Rows, mix, permute
from data.packing_config import PackingConfig
from data.ratio_schedule import RatioSchedule, Stage
from data.token_store import TokenStore

logger = logging.getLogger(__name__)

_CACHED_BLOCKS = 16  # 48 KiB each


@dataclass(frozen=True)
class MixtureRow:
    """One language, or one family (language ""), of the mixture."""

    family: str
    language: str
    tokens: int
    sequences: int
    weight: float  # share of the samples the run starts with
    sampling_ratio: float  # weight / share of the tokens: above 1 up-sampled, below 1 down-sampled


class LanguageMixture:
    """A stream of packed sequences from many stores at exact ratios.

    stores: one per language. mixture: see data/config.py. families: language -> family, for ratios
    and reports; None: what the stores say. plan_folder: where packing plans are kept.

    languages: the codes, sorted; a sample's language id is its place here. weights: by language,
    the share of the samples at the start of the run. end: the sample at which the data ends, where
    data.mixture.when_exhausted ends it; None otherwise.

    Raises ValueError for no stores, two stores of one language, stores of different tokenizers, and
    rules that do not fit the families and languages there are.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        seq_length: int,
        mixture: MixtureConfig,
        seed: int,
        packing: PackingConfig | None = None,
        families: Mapping[str, str] | None = None,
        plan_folder: Path | None = None,
    ):
        if not stores:
            raise ValueError("a mixture needs at least one token store")
        stores = sorted(stores, key=lambda store: store.language)
        self.languages = [store.language for store in stores]
        twice = {code for code in self.languages if self.languages.count(code) > 1}
        if twice:
            raise ValueError(f"more than one token store of {', '.join(sorted(twice))}")
        for store in stores[1:]:
            if store.info.tokenizer_fingerprint != stores[0].info.tokenizer_fingerprint:
                raise ValueError(
                    f"token stores of different tokenizers: {stores[0].prefix} of "
                    f"{stores[0].info.tokenizer_fingerprint[:16]}, {store.prefix} of "
                    f"{store.info.tokenizer_fingerprint[:16]}; tokenize both with the same one"
                )
        self.stores, self.seq_length, self.seed = stores, seq_length, seed
        self.packing, self.plan_folder = packing or PackingConfig(), plan_folder
        self.family_of = {
            store.language: families[store.language] if families else store.family
            for store in stores
        }
        self.families = sorted(set(self.family_of.values()))
        self.sequences = [
            PackedSequences(store, seq_length, packing=self.packing, plan_folder=plan_folder)
            for store in stores
        ]
        self._reader = RowReader(self.sequences)
        self._sizes = np.array([len(s) for s in self.sequences], np.int64)
        self._keys = np.array([_key(seed, code) for code in self.languages], np.uint64)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

        self.ratios = self._ratio_schedule(mixture)
        self.end = self.ratios.end
        self._schedule = MixtureSchedule(self.ratios, self._family_numbers())
        self.weights = dict(zip(self.languages, self.ratios.shares(0).tolist(), strict=True))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language id and sequence number of each sample, both shaped like `samples` (int64)."""
        samples = np.asarray(samples, np.int64)
        first, last = (int(samples.min()), int(samples.max())) if samples.size else (0, 0)
        if first // BLOCK == last // BLOCK:
            languages, numbers, _ = self._located(first // BLOCK)
            place = samples % BLOCK
            return languages[place], numbers[place]
        block, place = np.divmod(samples, BLOCK)
        language, number = np.empty_like(place), np.empty_like(place)
        for wanted in np.unique(block).tolist():
            here = block == wanted
            languages, numbers, _ = self._located(wanted)
            language[here], number[here] = languages[place[here]], numbers[place[here]]
        return language, number

    def locate_one(self, sample: int) -> tuple[int, int]:
        """`locate` of one sample, in plain numbers."""
        block, place = divmod(sample, BLOCK)
        languages, numbers, _ = self._located(block)
        return languages.item(place), numbers.item(place)

    def epoch_of(self, sample: int) -> int:
        """How many passes over its language were complete before this sample."""
        block, place = divmod(sample, BLOCK)
        return int(self._located(block)[2][place])

    def _located(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Language ids, sequence numbers and epochs of a whole block, [BLOCK] int64: 1 to 2 µs a
        sample when it is asked for first, nothing when it was asked for lately."""
        found = self._blocks.get(block)
        if found is None:
            language, drawn_before = self._schedule.block(block)
            sizes = self._sizes[language]
            epoch, position = np.divmod(drawn_before, sizes)
            key = mix(self._keys[language], epoch.astype(np.uint64))
            found = language, permute(position, sizes, key), epoch
            while len(self._blocks) >= _CACHED_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)), None)
            self._blocks[block] = found
        return found

    def read(self, languages: np.ndarray, numbers: np.ndarray) -> Rows:
        """The packed rows of b located samples."""
        return self._reader.read(languages, numbers)

    def counts(self, n: int) -> dict[str, int]:
        """Samples of each language before sample n, exact."""
        return dict(zip(self.languages, self._schedule.counts(n).tolist(), strict=True))

    def asked(self, n: int) -> dict[str, float]:
        """x(n): samples of each language asked for before sample n."""
        return dict(zip(self.languages, self.ratios.asked(n).tolist(), strict=True))

    def shares(self, n: int) -> dict[str, float]:
        """The share of each language at sample n."""
        return dict(zip(self.languages, self.ratios.shares(n).tolist(), strict=True))

    def changes(self, first: int, last: int) -> list[tuple[int, dict[str, float]]]:
        """Where in samples [first, last), 0 apart, ratios begin to change or a language is used up;
        and the shares that hold from there, or at the end of a ramp."""
        return [
            (start, dict(zip(self.languages, shares.tolist(), strict=True)))
            for start, _, shares in self.ratios.segments()
            if max(first, 1) <= start < last
        ]

    def epochs(self, n: int) -> dict[str, float]:
        """Passes over each language by sample n."""
        counts = self._schedule.counts(n)
        return dict(zip(self.languages, (counts / self._sizes).tolist(), strict=True))

    def exhausted(self) -> list[tuple[int, str]]:
        """(sample, language) where languages reach their epoch caps, in order."""
        return [(at, self.languages[i]) for at, i in self.ratios.exhausted]

    def rows(self) -> list[MixtureRow]:
        """For each family, its own row and then those of its languages, as the run starts."""
        total = sum(store.tokens for store in self.stores)

        def row(family: str, language: str, members: list[int]) -> MixtureRow:
            tokens = sum(self.stores[i].tokens for i in members)
            weight = sum(self.weights[self.languages[i]] for i in members)
            sequences = int(self._sizes[members].sum())
            return MixtureRow(family, language, tokens, sequences, weight, weight * total / tokens)

        rows = []
        for family in self.families:
            members = [i for i, code in enumerate(self.languages) if self.family_of[code] == family]
            rows.append(row(family, "", members))
            rows += [row(family, self.languages[i], [i]) for i in members]
        return rows

    def describe(self) -> str:
        """A table: tokens, weight and up- or down-sampling of each family and language."""
        lines = [
            f"{'family':<16}{'language':<10}{'tokens':>15}{'sequences':>12}{'weight':>10}{'ratio':>8}"
        ]
        for row in self.rows():
            lines.append(
                f"{row.family if not row.language else '':<16}{row.language:<10}{row.tokens:>15,}"
                f"{row.sequences:>12,}{row.weight:>10.5f}{row.sampling_ratio:>8.3f}"
            )
        return "\n".join(lines)

    def fingerprint(self) -> dict[str, Any]:
        """Everything the stream depends on, as JSON; `stream_differences` compares two."""
        return {
            "seq_length": self.seq_length,
            "seed": self.seed,
            "tokenizer": self.stores[0].info.tokenizer_fingerprint,
            "packing": self.packing.fingerprint(),
            "block": BLOCK,
            "stores": {store.language: store.info.bin_sha256 for store in self.stores},
            "families": self.family_of,
            "ratios": [
                {
                    "from_sample": start,
                    "ramp_samples": ramp,
                    "shares": dict(zip(self.languages, shares.tolist(), strict=True)),
                }
                for start, ramp, shares in self.ratios.segments()
            ],
        }

    def _family_numbers(self) -> np.ndarray:
        number = {family: i for i, family in enumerate(self.families)}
        return np.array([number[self.family_of[code]] for code in self.languages])

    def _ratio_schedule(self, mixture: MixtureConfig) -> RatioSchedule:
        unknown = sorted(set(mixture.language_max_epochs) - set(self.languages))
        if unknown:
            raise ValueError(
                f"data.mixture.language_max_epochs names {', '.join(unknown)}"
                f"{did_you_mean(unknown, self.languages) or '.'} The data has "
                f"{', '.join(self.languages)}"
            )
        sizes = {packed.store.language: _size(packed, mixture.unit) for packed in self.sequences}
        stages: list[Stage] = []
        free = 0  # where the ramp of the stage before has ended, which rounding must not cross
        for number, (from_tokens, ramp_tokens, rule) in enumerate(mixture.rules()):
            setting = f"data.mixture.stages[{number - 1}]" if number else "data.mixture"
            shares = language_shares(rule, sizes, self.family_of, mixture.max_epochs, setting)
            if mixture.unit is not RatioUnit.tokens:
                shares = weights.in_tokens(
                    shares,
                    {
                        p.store.language: _size(p, mixture.unit) / _size(p, RatioUnit.tokens)
                        for p in self.sequences
                    },
                )
            start = max(free, round(from_tokens / self.seq_length))
            ramp = round(ramp_tokens / self.seq_length)
            free = start + ramp
            stages.append(Stage(start, ramp, np.array([shares[code] for code in self.languages])))
        caps = [
            mixture.language_max_epochs.get(code, mixture.max_epochs) for code in self.languages
        ]
        limits = np.array(
            [
                np.inf if cap is None else np.floor(cap * len(packed) / packed.repeats)
                for cap, packed in zip(caps, self.sequences, strict=True)
            ]
        )
        return RatioSchedule(stages, self._family_numbers(), limits, mixture.when_exhausted)


def language_shares(
    rule: RatioRule,
    sizes: Mapping[str, float],
    family_of: Mapping[str, str],
    max_epochs: float | None = None,
    setting: str = "data.mixture",
) -> dict[str, float]:
    """Each language's share of what is drawn, in the unit of the sizes; sums to 1.

    The rule's weighting acts on families by their summed sizes, then within_family on the languages
    of each; UniMax acts on the languages. Within a family the default is proportional, which leaves
    the family's own data distribution as it is (arXiv 2410.12883 does not say what it does).

    Raises ValueError for ratios, exponents or shares that do not name exactly the families or
    languages there are; `setting` is how the user wrote the rule.
    """
    for name in ("drop_languages", "language_shares"):
        unknown = sorted(set(getattr(rule, name)) - set(sizes))
        if unknown:
            raise ValueError(
                f"{setting}.{name} names {', '.join(unknown)}"
                f"{did_you_mean(unknown, sizes) or '.'} The data has {', '.join(sizes)}"
            )
    drawn = {code: 0.0 if code in rule.drop_languages else n for code, n in sizes.items()}
    members: dict[str, dict[str, float]] = {}
    for code, size in drawn.items():
        members.setdefault(family_of[code], {})[code] = size
    of_families = {family: sum(sizes.values()) for family, sizes in sorted(members.items())}
    if not any(of_families.values()):
        raise ValueError(f"{setting}.drop_languages leaves no language; keep at least one")
    if rule.weighting is Weighting.unimax:  # of languages; families get what theirs add up to
        assert rule.budget is not None and max_epochs is not None  # RatioRule.problems
        return weights.unimax(drawn, rule.budget, max_epochs)
    ratios = _family_ratios(rule, of_families, setting)
    shares: dict[str, float] = {}
    for family, ratio in ratios.items():
        if ratio:
            within = _within_family(rule, family, members[family], setting)
            shares |= {code: ratio * share for code, share in within.items()}
        else:
            shares |= dict.fromkeys(members[family], 0.0)
    return {code: shares[code] for code in sizes}


def _family_ratios(
    rule: RatioRule,
    sizes: Mapping[str, float],
    setting: str,
) -> dict[str, float]:
    if rule.weighting is Weighting.temperature:
        return weights.temperature(sizes, rule.alpha)
    if rule.weighting is Weighting.uniform:
        return weights.uniform(sizes)
    if rule.weighting is Weighting.proportional:
        return weights.proportional(sizes)
    if rule.weighting is Weighting.ratios:
        _check_names(rule.ratios, sizes, f"{setting}.ratios")
        ratios = weights.explicit(
            rule.ratios, normalize=rule.normalize, setting=f"{setting}.ratios"
        )
    else:
        _check_names(rule.gamma, sizes, f"{setting}.gamma")
        if rule.losses:
            _check_names(rule.losses, sizes, f"{setting}.losses")
        drawn = [family for family, size in sizes.items() if size]
        optimum = weights.scaling_law_optimum(
            {family: rule.gamma[family] for family in drawn},
            {family: rule.losses[family] for family in drawn} if rule.losses else None,
        )
        ratios = {family: optimum.get(family, 0.0) for family in sizes}
    empty = [family for family, size in sizes.items() if ratios[family] and not size]
    if empty:
        raise ValueError(
            f"{setting}: {', '.join(empty)} has a ratio but no language that is drawn; set its "
            "ratio to 0 or drop fewer languages"
        )
    return {family: ratios[family] for family in sizes}


def _within_family(
    rule: RatioRule, family: str, sizes: Mapping[str, float], setting: str
) -> dict[str, float]:
    if rule.within_family is WithinFamily.temperature:
        return weights.temperature(sizes, rule.within_family_alpha)
    if rule.within_family is WithinFamily.uniform:
        return weights.uniform(sizes)
    if rule.within_family is WithinFamily.shares:
        drawn = [code for code, size in sizes.items() if size]
        lacking = [code for code in drawn if code not in rule.language_shares]
        if lacking:
            raise ValueError(
                f"{setting}.language_shares does not name {', '.join(lacking)} of the family "
                f"{family}; every language of a family that is drawn needs its share (0 leaves it "
                "out)"
            )
        given = {code: rule.language_shares[code] for code in drawn}
        name = f"{setting}.language_shares of {family}"
        return weights.explicit(given, normalize=rule.normalize, setting=name) | {
            code: 0.0 for code in sizes if code not in given
        }
    return weights.proportional(sizes)


def _check_names(given: Mapping[str, float], families: Mapping[str, float], setting: str) -> None:
    if set(given) == set(families):
        return
    lacking, unknown = sorted(set(families) - set(given)), sorted(set(given) - set(families))
    parts = [f"lacks {', '.join(lacking)}"] * bool(lacking)
    parts += [f"names {', '.join(unknown)}, which the data has not"] * bool(unknown)
    raise ValueError(
        f"{setting} {' and '.join(parts)}{did_you_mean(unknown, sorted(families)) or '.'} It must "
        f"name exactly the families of the data: {', '.join(sorted(families))}"
    )


def stream_differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], consumed: int
) -> list[str]:
    """Where two fingerprints disagree about the first `consumed` samples, one line each; of
    languages that differ in the same way, no more than three.

    Shares follow from sizes that are cut to whole sequences: where seq_length differs, which has
    its own line, they are not compared. What comes later may change from start to start of a run:
    ratios, stages, caps, and languages that have not been drawn yet.
    """
    names = sorted({*saved, *now} - {"ratios", "stores", "families"})
    lines = [
        f"{name}: was {saved.get(name)}, is {now.get(name)}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
    before, after = (
        [s for s in fingerprint.get("ratios", []) if s["from_sample"] < consumed]
        for fingerprint in (saved, now)
    )
    same_length = saved.get("seq_length") == now.get("seq_length")
    for was, is_ in zip(before, after, strict=False):
        lines += _segment_differences(was, is_)
        lines += _few(_share_differences(was, is_)) if same_length else []
    for segment in before[len(after) :] or after[len(before) :]:
        lines.append(
            f"the ratios that changed at sample {segment['from_sample']}, before sample {consumed},"
            f" {'have gone' if len(before) > len(after) else 'are new'}"
        )
    drawn = sorted({code for s in before for code, share in s["shares"].items() if share})
    for name, what in (("stores", "token store"), ("families", "family")):
        pairs = [(c, saved.get(name, {}).get(c), now.get(name, {}).get(c)) for c in drawn]
        lines += _few(
            [
                f"{what} of {code}: was {was}, is {is_ or 'not there'}"
                for code, was, is_ in pairs
                if was != is_
            ]
        )
    return lines


def _few(lines: list[str], most: int = 3) -> list[str]:
    more = len(lines) - most
    return [*lines[:most], f"... and {more} more"] if more > 0 else lines


def _segment_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} of a change of ratios: was {was[name]}, is {now[name]}"
        for name in ("from_sample", "ramp_samples")
        if was[name] != now[name]
    ]


def _share_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for code in sorted({*was["shares"], *now["shares"]}):
        before, after = was["shares"].get(code, 0.0), now["shares"].get(code, 0.0)
        if before != after:
            short = f"{before:.4g}", f"{after:.4g}"
            said = short if short[0] != short[1] else (before, after)
            lines.append(
                f"share of {code} from sample {was['from_sample']}: was {said[0]}, is {said[1]}"
            )
    return lines


def _size(packed: PackedSequences, unit: RatioUnit) -> float:
    """How much of its language a store has for training: without what is cut off at its end."""
    store = packed.store
    tokens = min(store.tokens, len(packed) * packed.seq_length)
    if unit is RatioUnit.tokens:
        return float(tokens)
    size = store.info.characters if unit is RatioUnit.characters else store.info.utf8_bytes
    if not size:
        raise ValueError(
            f"data.mixture.unit={unit.value}: {store.prefix} does not record its {unit.value}; "
            "tokenize the corpus again, or use data.mixture.unit=tokens"
        )
    return size * tokens / store.tokens


def _key(seed: int, language: str) -> int:
    """By code, not by place: adding a language leaves the order within the others as it was."""
    digest = hashlib.blake2b(f"{seed}/{language}".encode(), digest_size=8, person=b"order")
    return int.from_bytes(digest.digest(), "little")
