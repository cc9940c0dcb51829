"""The schedule keeps every language and family near what is asked for, at every prefix."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.config import WhenExhausted
from data.mixture_schedule import BLOCK, MixtureSchedule
from data.ratio_schedule import RatioSchedule, Stage

UNLIMITED = WhenExhausted.repeat


def schedule_of(
    shares: np.ndarray, families: np.ndarray, *stages: Stage
) -> tuple[MixtureSchedule, RatioSchedule]:
    ratios = RatioSchedule(
        [Stage(0, 0, shares), *stages], families, np.full(len(shares), np.inf), UNLIMITED
    )
    return MixtureSchedule(ratios, families), ratios


def errors(
    schedule: MixtureSchedule, ratios: RatioSchedule, families: np.ndarray, first_block: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """|drawn - asked| of languages [samples, k] and of families, after each of n blocks' samples"""
    drawn_languages = np.concatenate([schedule.block(first_block + i)[0] for i in range(n)])
    k = len(families)
    drawn = schedule.counts_at_border(first_block) + np.cumsum(np.eye(k)[drawn_languages], axis=0)
    first = first_block * BLOCK + 1
    asked = np.stack([ratios.asked(first + i) for i in range(len(drawn))])
    member = np.eye(families.max() + 1)[families]
    return np.abs(drawn - asked), np.abs(drawn @ member - asked @ member)


def slow_schedule(
    schedule: MixtureSchedule, ratios: RatioSchedule, families: np.ndarray, block: int
) -> list[int]:
    """A block by its definition, for constant shares: at every sample, of the languages whose own
    and whose family's window are open, the earliest deadline, its own or its family's."""
    first, members = block * BLOCK, np.eye(families.max() + 1)[families]
    low, high = schedule.counts_at_border(block), schedule.counts_at_border(block + 1)
    asked, shares = ratios.asked(first), ratios.shares(first)

    def windows(start: int, stop: int, asked: float, share: float) -> list[tuple[float, float]]:
        return [((j - asked) / share, (j + 1 - asked) / share) for j in range(start, stop)]

    left = [windows(*each) for each in zip(low, high, asked, shares, strict=True)]
    sums = (low @ members).astype(int), (high @ members).astype(int)
    of_family = [
        windows(*each) for each in zip(*sums, asked @ members, shares @ members, strict=True)
    ]
    drawn = []
    for sample in range(BLOCK):
        heads: dict[int, tuple[float, int]] = {}  # by family: its most urgent language
        for language, family in enumerate(families.tolist()):
            open_now = left[language] and left[language][0][0] < sample + 1
            if open_now and of_family[family] and of_family[family][0][0] < sample + 1:
                head = (left[language][0][1], language)
                heads[family] = min(heads.get(family, head), head)
        family = min(heads, key=lambda f: (min(heads[f][0], of_family[f][0][1]), f))
        language = heads[family][1]
        of_family[family].pop(0)
        left[language].pop(0)
        drawn.append(language)
    return drawn


@pytest.mark.parametrize(
    ("seed", "several_rounds"),
    [(1, False), (3, False), (8, False), (13, False), (4, True), (5, True), (9, True), (14, True)],
)
def test_a_block_is_scheduled_earliest_deadline_first(
    seed: int, several_rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample for sample what the definition says, also where languages are due before the samples
    of their families, so that families and languages take turns several times."""
    generator = np.random.default_rng(seed)
    k = int(generator.integers(3, 30))
    shares = generator.dirichlet(np.full(k, 2.0))
    _, families = np.unique(generator.integers(0, generator.integers(1, 7), k), return_inverse=True)
    schedule, ratios = schedule_of(shares, families)
    expected = slow_schedule(schedule, ratios, families, 1)
    assert schedule.block(1)[0].tolist() == expected
    monkeypatch.setattr("data.mixture_schedule._ROUNDS", 1)
    assert (schedule.block(1)[0].tolist() != expected) == several_rounds


def test_a_block_that_only_works_backwards() -> None:
    """From its start to its end, earliest deadline first misses a window here."""
    generator = np.random.default_rng(1221)
    k = int(generator.integers(3, 16))
    shares = generator.dirichlet(np.ones(k))
    _, families = np.unique(generator.integers(0, generator.integers(2, 5), k), return_inverse=True)
    schedule, ratios = schedule_of(shares, families)
    assert slow_schedule(schedule, ratios, families, 2) != schedule.block(2)[0].tolist()
    of_languages, of_families = errors(schedule, ratios, families, 2, 1)
    assert of_languages.max() < 1 + 1e-6 and of_families.max() < 1 + 1e-6
    languages, before = schedule.block(2)
    for language in range(k):  # in the order of their numbers all the same
        assert (np.diff(before[languages == language]) == 1).all()


@pytest.mark.parametrize("seed", range(12))
def test_languages_and_families_stay_within_one_sample(seed: int) -> None:
    """At every prefix, for languages with a sample a block: 3 to 120 of them, sizes up to 5000:1,
    at the start and ten million blocks later."""
    generator = np.random.default_rng(seed)
    while True:
        k = int(generator.integers(3, 120))
        sizes = np.exp(generator.uniform(0, np.log(generator.choice([20, 236, 5000])), k))
        shares = sizes ** generator.choice([0.3, 0.7, 1.0])
        shares /= shares.sum()
        if shares.min() * BLOCK >= 1:
            break
    _, families = np.unique(
        generator.integers(0, generator.integers(1, 24), k), return_inverse=True
    )
    schedule, ratios = schedule_of(shares, families)
    of_languages, of_families = errors(
        schedule, ratios, families, int(generator.choice([0, 10**7])), 2
    )
    # 1 is reached where a share is a round number; the rest is the float x(n)
    assert of_languages.max() < 1 + 1e-6
    assert of_families.max() < 1 + 1e-6


def test_rare_languages_may_cost_their_families_a_little() -> None:
    """Below one sample in a block: within one sample themselves; the others make up for it."""
    shares = np.array([0.55, 0.4, *[0.05 / 200] * 200])
    families = np.array([0, 1, *[i % 3 for i in range(200)]])
    schedule, ratios = schedule_of(shares, families)
    of_languages, _ = errors(schedule, ratios, families, 3, 2)
    assert of_languages[:, 2:].max() < 1 + 1e-6
    for block in range(40):
        before, after = schedule.counts_at_border(block), schedule.counts_at_border(block + 1)
        assert (after >= before).all() and after.sum() == (block + 1) * BLOCK


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.lists(st.floats(1e-5, 1.0), min_size=1, max_size=12),
    later=st.lists(st.floats(0.0, 1.0), min_size=12, max_size=12),
    family_seed=st.integers(0, 10),
    start=st.integers(1, 3 * BLOCK),
    ramp=st.integers(0, 2 * BLOCK),
)
def test_whole_numbers_whatever_the_shares(
    sizes: list[float], later: list[float], family_seed: int, start: int, ramp: int
) -> None:
    """Every block draws exactly its samples, numbers never fall, and blocks fit together."""
    k = len(sizes)
    shares = np.array(sizes) / sum(sizes)
    then = np.array(later[:k])
    then = then / then.sum() if then.sum() > 1e-3 else shares
    _, families = np.unique(
        np.random.default_rng(family_seed).integers(0, 4, k), return_inverse=True
    )
    schedule, ratios = schedule_of(shares, families, Stage(start, ramp, then))
    for block in range(6):
        languages, before = schedule.block(block)
        low, high = schedule.counts_at_border(block), schedule.counts_at_border(block + 1)
        assert len(languages) == BLOCK
        assert (np.bincount(languages, minlength=k) == high - low).all()
        for language in np.unique(languages):
            mine = before[languages == language]
            assert mine.tolist() == list(range(low[language], high[language]))
        place = 777 % BLOCK
        expected = low + np.bincount(languages[:place], minlength=k)
        assert (schedule.counts(block * BLOCK + place) == expected).all()
        assert np.abs(high - ratios.asked((block + 1) * BLOCK)).max() < k  # far less in general


def test_a_share_of_zero_is_never_drawn() -> None:
    shares, families = np.array([0.5, 0.0, 0.5]), np.array([0, 0, 1])
    schedule, _ = schedule_of(shares, families)
    assert 1 not in np.concatenate([schedule.block(b)[0] for b in (0, 1, 10**6)])


def test_exact_after_ten_billion_samples() -> None:
    """No drift: a share of 1/3 is 1/3 of 10^10, to a sample."""
    shares, families = np.array([1 / 3, 0.6, 0.2 / 3]), np.array([0, 1, 1])
    schedule, _ = schedule_of(shares, families)
    n = 10**10
    assert np.abs(schedule.counts(n) - shares * n).max() < 1 + 1e-5


@pytest.mark.parametrize("ramp", [0, 3000, 5 * BLOCK])
def test_stages_and_ramps_are_followed_sample_by_sample(ramp: int) -> None:
    shares, families = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0, 0, 1, 2])
    then = np.array([0.1, 0.2, 0.4, 0.3])
    schedule, ratios = schedule_of(shares, families, Stage(2500, ramp, then))
    of_languages, of_families = errors(schedule, ratios, families, 0, 8)
    # within a block a ramp is followed in straight pieces
    assert of_languages.max() < 1.1 and of_families.max() < 1.1
    if not ramp:
        counts = schedule.counts(10_000) - schedule.counts(2500)
        np.testing.assert_allclose(counts / 7500, then, atol=2 / 7500)


def test_a_later_stage_changes_nothing_before_it() -> None:
    shares, families = np.array([0.5, 0.3, 0.2]), np.array([0, 0, 1])
    without, _ = schedule_of(shares, families)
    start = 5 * BLOCK
    with_it, _ = schedule_of(shares, families, Stage(start, 0, np.array([0.0, 0.5, 0.5])))
    for block in range(4):  # the border of a block looks one block ahead
        assert (without.block(block)[0] == with_it.block(block)[0]).all()
    assert 0 not in with_it.block(6)[0]
