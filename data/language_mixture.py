"""Which language and which of its sequences is sample n: a formula of (seed, n), with no index.

    family weights (tokens, temperature, uniform or given)  x  language's share of its family
      -> whole counts in a block of 65 536 samples -> one schedule of languages, repeated
    the k-th sample of a language -> epoch k // sequences, place k % sequences
      -> a permutation keyed by (seed, language, epoch) -> the sequence

The schedule keeps every language within one sample of its exact share at every prefix, so also in
every batch. Memory and start-up do not depend on how long the training is, any sample is found in
O(1), and lengthening a run changes nothing that came before.
"""

import hashlib
import heapq
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.config import MixtureConfig, Weighting
from data.packed_sequences import PackedSequences, mix, permute
from data.token_store import TokenStore

logger = logging.getLogger(__name__)

# Weights are whole multiples of 1/65536. The block costs 0.6 MB and about 0.1 s at start-up.
SAMPLES_PER_BLOCK = 65536


@dataclass(frozen=True)
class MixtureRow:
    """One language, or one family (language ""), of the mixture."""

    family: str
    language: str
    tokens: int
    sequences: int
    weight: float  # share of the samples, exact
    sampling_ratio: float  # weight / share of the tokens: above 1 up-sampled, below 1 down-sampled


class LanguageMixture:
    """A stream of packed sequences from many stores at exact ratios.

    stores: one per language. weighting, alpha and ratios act on families by their tokens
    (MixtureConfig); within a family languages are weighted by tokens, which leaves the family's own
    data distribution as it is (arXiv 2410.12883 does not say what it does).

    languages: the codes, sorted; a sample's language id is its place here. weights: by language,
    what is really drawn, multiples of 1/65536; the rounding is the only departure from the weights
    asked for, at most 2**-16 each.

    Raises ValueError for no stores, two stores of one language, stores of different tokenizers, and
    ratios that do not name exactly the families there are.
    """

    def __init__(
        self, stores: Sequence[TokenStore], seq_length: int, mixture: MixtureConfig, seed: int
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
        self.family_of = {store.language: store.family for store in stores}
        self.families = sorted(set(self.family_of.values()))
        self._mixture = mixture
        self._sequences = [PackedSequences(store, seq_length) for store in stores]
        self._sizes = np.array([len(s) for s in self._sequences], np.int64)
        self._keys = np.array([_key(seed, code) for code in self.languages], np.uint64)

        asked = self._language_weights()
        self._counts = apportion(asked, SAMPLES_PER_BLOCK)
        lost = [self.languages[i] for i in np.flatnonzero((asked > 0) & (self._counts == 0))]
        if lost:
            logger.warning(
                "the weight of %s is below 1/%d and rounds to nothing: no sample of it will be "
                "drawn; raise its family's ratio or lower data.mixture.alpha",
                ", ".join(lost),
                2 * SAMPLES_PER_BLOCK,
            )
        self.weights = dict(zip(self.languages, self._counts / SAMPLES_PER_BLOCK, strict=True))
        self._schedule = balanced_schedule(self._counts)
        self._rank = _rank_within(self._schedule, len(stores))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language id and sequence number of each sample, both shaped like `samples` (int64)."""
        block, place = np.divmod(np.asarray(samples, np.int64), SAMPLES_PER_BLOCK)
        language = self._schedule[place].astype(np.int64)
        drawn_before = block * self._counts[language] + self._rank[place]
        epoch, position = np.divmod(drawn_before, self._sizes[language])
        key = mix(self._keys[language], epoch.astype(np.uint64))
        return language, permute(position, self._sizes[language], key)

    def read(self, languages: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids `[b, seq_length + 1]` and valid labels `[b]` of b located samples, int64.

        Every label of a training sample is valid.
        """
        ids = np.empty((len(languages), self.seq_length + 1), np.int64)
        valid = np.empty(len(languages), np.int64)
        for row, (language, number) in enumerate(
            zip(languages.tolist(), numbers.tolist(), strict=True)
        ):
            valid[row] = self._sequences[language].fill(number, ids[row])
        return ids, valid

    def rows(self) -> list[MixtureRow]:
        """For each family, its own row and then those of its languages."""
        total = sum(store.tokens for store in self.stores)

        def row(family: str, language: str, members: list[int]) -> MixtureRow:
            tokens = sum(self.stores[i].tokens for i in members)
            weight = float(self._counts[members].sum()) / SAMPLES_PER_BLOCK
            sequences = int(self._sizes[members].sum())
            return MixtureRow(family, language, tokens, sequences, weight, weight * total / tokens)

        rows = []
        for family in self.families:
            members = [i for i, store in enumerate(self.stores) if store.family == family]
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
        """Everything the stream depends on, as JSON: equal fingerprints give equal samples."""
        return {
            "seq_length": self.seq_length,
            "seed": self.seed,
            "tokenizer": self.stores[0].info.tokenizer_fingerprint,
            "stores": {store.language: store.info.bin_sha256 for store in self.stores},
            "samples_per_block": {
                code: int(count) for code, count in zip(self.languages, self._counts, strict=True)
            },
        }

    def _language_weights(self) -> np.ndarray:
        tokens = np.array([store.tokens for store in self.stores], np.float64)
        family_id = np.array([self.families.index(store.family) for store in self.stores])
        family_tokens = np.bincount(family_id, weights=tokens)
        weights = family_weights(
            dict(zip(self.families, family_tokens.tolist(), strict=True)), self._mixture
        )
        family_weight = np.array([weights[family] for family in self.families])
        return family_weight[family_id] * tokens / family_tokens[family_id]


def family_weights(tokens: Mapping[str, float], mixture: MixtureConfig) -> dict[str, float]:
    """The weight of each family, summing to 1, from its tokens and the settings.

    proportional: p = n / sum n. temperature: p proportional to n ** alpha (alpha = 1/T, XLM-E's
    arXiv 2106.16138; fairseq calls it multilang_sampling_alpha). uniform: equal. ratios: as given.
    Raises ValueError unless the ratios name exactly the families of `tokens`.
    """
    counts = np.array(list(tokens.values()), np.float64)
    if mixture.weighting is Weighting.ratios:
        missing, unknown = (
            sorted(set(tokens) - set(mixture.ratios)),
            sorted(set(mixture.ratios) - set(tokens)),
        )
        if missing or unknown:
            raise ValueError(
                "data.mixture.ratios must name the families of the data, no more and no fewer: "
                + (f"missing {', '.join(missing)}" if missing else "")
                + ("; " if missing and unknown else "")
                + (f"not in the data: {', '.join(unknown)}" if unknown else "")
                + f"; the families are {', '.join(sorted(tokens))} (0 leaves one out)"
            )
        raw = np.array([mixture.ratios[family] for family in tokens], np.float64)
    else:
        alpha = {
            Weighting.proportional: 1.0,
            Weighting.temperature: mixture.alpha,
            Weighting.uniform: 0.0,
        }[mixture.weighting]
        raw = (counts / counts.sum()) ** alpha
    return dict(zip(tokens, (raw / raw.sum()).tolist(), strict=True))


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers proportional to the weights that sum to total, by largest remainder."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    remainder = exact - counts
    # stable: of equal remainders the first language wins, on every machine
    order = np.argsort(-remainder, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


def balanced_schedule(counts: np.ndarray) -> np.ndarray:
    """An order of sum(counts) items in which every kind is near its share at every prefix.

    Among the first N of B items, the number of kind i differs from N counts[i] / B by at most
    1 - 1 / (2 k - 2) for k kinds: the chairman assignment of Tijdeman (1980, "The chairman
    assignment problem", Discrete Mathematics 32). With d = 1 / (2 k - 2), item j (from 1) of kind
    i may be placed from slot ceil((j - 1 + d) B / counts[i]) on, and each slot takes the ready item
    with the earliest deadline (j - d) B / counts[i]. Kinds with count 0 take no part.
    """
    size = int(counts.sum())
    kinds = np.flatnonzero(counts)
    if len(kinds) == 1:
        return np.full(size, kinds[0], np.int32)
    halves = 2 * len(kinds) - 2  # 1 / d
    kind = np.repeat(kinds, counts[kinds])
    count = counts[kind]
    item = 1 + _rank_within(kind, len(counts)).astype(np.int64)
    # in whole numbers, so that no rounding makes an item late
    release = -(-(((item - 1) * halves + 1) * size) // (halves * count))
    # places in the order of the deadlines: small, and ties go to the first kind
    by_deadline = np.argsort((item * halves - 1) * size / (halves * count), kind="stable")
    place = np.empty(size, np.int64)
    place[by_deadline] = np.arange(size)
    kind_at = kind[by_deadline].astype(np.int32)
    by_release = np.argsort(release, kind="stable")
    arriving, arrives = place[by_release].tolist(), [*release[by_release].tolist(), size + 1]

    order: list[int] = []
    ready: list[int] = []
    arrived = 0
    for slot in range(1, size + 1):
        while arrives[arrived] <= slot:
            heapq.heappush(ready, arriving[arrived])
            arrived += 1
        order.append(heapq.heappop(ready))
    return kind_at[order]


def _rank_within(schedule: np.ndarray, kinds: int) -> np.ndarray:
    """How many items of the same kind come before each item."""
    order = np.argsort(schedule, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(schedule, minlength=kinds))[:-1]])
    rank = np.empty(len(schedule), np.int32)
    rank[order] = np.arange(len(schedule)) - first[schedule[order]]
    return rank


def _key(seed: int, language: str) -> int:
    """By code, not by place: adding a language leaves the order within the others as it was."""
    digest = hashlib.blake2b(f"{seed}/{language}".encode(), digest_size=8, person=b"order")
    return int.from_bytes(digest.digest(), "little")
