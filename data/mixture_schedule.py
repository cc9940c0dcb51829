"""Which language sample n is of, at exact ratios, as a formula of n.

x(n) is how many samples of each language have been asked for before sample n, a real number
(data/ratio_schedule.py). What is drawn are whole samples, so a schedule has to stay near x:

    every 2048 samples   the drawn numbers are x rounded up or down, such that every family's sum is
                         its own x rounded up or down too (controlled rounding, Cox 1987): a formula
                         of n alone
    in between           earliest deadline first. The j-th sample of a language may not be drawn
                         before x reaches j - 1 and should be drawn before x reaches j (a "P-fair"
                         window: Baruah, Cohen, Plaxton and Varvel 1996); the same holds for each
                         family, and the earlier of the two deadlines decides

In between, families take turns first, by their own deadlines; then the languages of each family
take turns at the samples it got, by theirs. Where a language is due earlier than the sample of its
family that it got, that sample of the family is due then, and both take turns again, until that
happens nowhere. What comes out is what one finds by asking at every sample for the earliest
deadline of all, but no step of it looks at every family, and languages that are alone in their
families, or whose families are never early, take one round.

So a block of 2048 samples is computed from its number alone, in 1 to 3 ms, and any sample of any
run is found without an index. Languages and families stay within one sample of x at every n: at the
block borders by construction, in between in all but few mixtures (of 10 794 random ones with round
shares 5 had a language off by up to 1.11; the tests draw others). Languages that get less than
one sample in a block are another exception: at the borders they are rounded to the nearest number
whatever their family's sum, and the others make up for it.
"""

from __future__ import annotations

from bisect import insort

import numpy as np

from data.ratio_schedule import RatioSchedule

# Long enough that most languages have a sample in it, short enough to be computed in no time.
# The stream depends on it: changing it makes old runs impossible to continue.
BLOCK = 2048
_ROUNDING = 1e-9  # x is a float: this much below a whole number counts as that number
_ROUNDS = 32  # more than 17 have not been seen; most blocks take 1 to 3


class MixtureSchedule:
    """The language of every sample. families: [languages], numbers 0 .. of their families."""

    def __init__(self, ratios: RatioSchedule, families: np.ndarray):
        self._ratios, self._family_of = ratios, families
        self._num_families = int(families.max()) + 1

    def counts(self, n: int) -> np.ndarray:
        """Samples of each language before sample n, exact: [languages] int64."""
        block, place = divmod(n, BLOCK)
        counts = self.counts_at_border(block)
        if place:
            languages, _ = self.block(block)
            counts = counts + np.bincount(languages[:place], minlength=len(counts))
        return counts

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the samples BLOCK·number and on, [BLOCK] each: their languages, and how many samples
        of the same language come before each in the whole run (int64)."""
        first = number * BLOCK
        start, stop = self.counts_at_border(number), self.counts_at_border(number + 1)
        knots = self._ratios.knots(first, first + BLOCK)
        asked = np.stack([self._ratios.asked(n) for n in knots])  # [knots, languages]
        time = np.array(knots, np.float64) - first

        def per_family(values: np.ndarray) -> np.ndarray:
            return np.bincount(self._family_of, values, self._num_families)

        languages = _Windows.of(time, asked, start, stop)
        families = _Windows.of(
            time,
            np.stack([per_family(row) for row in asked]),
            per_family(start).astype(np.int64),
            per_family(stop).astype(np.int64),
        )
        drawn, missed = _draw(languages, families, self._family_of)
        if missed:  # then from the end to the start: another valid order, which may miss none
            turned = languages.reversed()
            backwards, missed_then = _draw(turned, families.reversed(), self._family_of)
            if missed_then < missed:
                languages, drawn = turned, backwards[::-1]
        return languages.member[drawn], languages.number[drawn]

    def counts_at_border(self, block: int) -> np.ndarray:
        """Samples of each language before sample BLOCK·block: controlled rounding of x, int64."""
        n = block * BLOCK
        asked = self._ratios.asked(n)
        if block == 0:
            return np.zeros(len(asked), np.int64)
        # Numbers must not fall from one border to the next. Rounded up here and down there they
        # could, where a language grows by less than one sample in a block: the nearest whole
        # number is safe for those.
        before, after = self._ratios.asked(n - BLOCK), self._ratios.asked(n + BLOCK)
        rare = np.minimum(asked - before, after - asked) < 1
        low = np.floor(asked + _ROUNDING).astype(np.int64)
        counts = np.where(rare, np.floor(asked + 0.5).astype(np.int64), low)
        raisable = ~rare & (asked - low > _ROUNDING)

        # whole numbers of the families, between what their languages can give
        family = self._family_of
        families_asked = np.bincount(family, asked, self._num_families)
        least = np.bincount(family, counts, self._num_families).astype(np.int64)
        most = least + np.bincount(family, raisable, self._num_families).astype(np.int64)
        floor = np.floor(families_asked + _ROUNDING).astype(np.int64)
        target = np.clip(floor, least, most)
        # the largest remainders first, as a family that was raised has none left
        while (missing := n - int(target.sum())) > 0 and (most > target).any():
            order = np.argsort(target - families_asked, kind="stable")
            target[order[(most > target)[order]][:missing]] += 1
        while (missing := n - int(target.sum())) < 0 and (target > least).any():
            order = np.argsort(families_asked - target, kind="stable")
            target[order[(target > least)[order]][:-missing]] -= 1

        # the languages with the largest remainders are rounded up
        remainders = np.where(raisable, low - asked, np.inf)
        order = np.lexsort((remainders, family))
        first = np.searchsorted(family[order], np.arange(self._num_families))
        place = np.arange(len(order)) - first[family[order]]
        counts[order[place < (target - least)[family[order]]]] += 1
        counts[int(np.argmax(after - before))] += n - int(counts.sum())  # hardly ever anything
        return counts


class _Windows:
    """When each sample of each member (language or family) should be drawn, in one block.

    [BLOCK] each, by member and then in the order of drawing. release, deadline: float64, in samples
    since the block's start; member; number: how many of the member come before in the whole run.
    What is drawn as the i-th of the block (from 0) is within one sample of what is asked for if
    release < i + 1 and i < deadline.
    """

    def __init__(
        self, release: np.ndarray, deadline: np.ndarray, member: np.ndarray, number: np.ndarray
    ):
        self.release, self.deadline, self.member, self.number = release, deadline, member, number

    @classmethod
    def of(
        cls, time: np.ndarray, asked: np.ndarray, start: np.ndarray, stop: np.ndarray
    ) -> _Windows:
        """time [knots], asked [knots, members]; start and stop [members], drawn at either end."""
        drawn = stop - start
        member = np.repeat(np.arange(len(drawn)), drawn)
        number = np.arange(len(member)) + np.repeat(start - np.cumsum(drawn) + drawn, drawn)
        if len(time) == 2:
            grown = (asked[1] - asked[0])[member]
            # a language that is rounded to a sample which nothing asks for may be drawn any time
            length = BLOCK / np.maximum(grown, 1e-300)
            release = (number - asked[0][member]) * length
            deadline = release + length
            release[grown <= 0], deadline[grown <= 0] = -np.inf, np.inf
            return cls(release, deadline, member, number)
        release, deadline = np.empty(len(member)), np.empty(len(member))
        for m in np.flatnonzero(drawn).tolist():
            mine, course = member == m, asked[:, m]
            release[mine] = np.interp(number[mine], course, time, left=-np.inf)
            deadline[mine] = np.interp(number[mine] + 1, course, time, right=np.inf)
        return cls(release, deadline, member, number)

    def opens(self) -> np.ndarray:
        """The first sample of the block at which each may be drawn: [BLOCK] int64, up to BLOCK."""
        return np.clip(self.release, 0, BLOCK).astype(np.int64)

    def reversed(self) -> _Windows:
        """The same windows with time running backwards."""
        order = np.lexsort((-self.number, self.member))
        return _Windows(
            BLOCK - self.deadline[order],
            BLOCK - self.release[order],
            self.member[order],
            self.number[order],
        )

    def missed(self, sample: np.ndarray) -> int:
        """How many lie outside their window, drawn as these samples of the block: [BLOCK]."""
        early = self.release > sample + 1 + _ROUNDING
        late = sample > self.deadline + _ROUNDING
        return int((early | late).sum())


def _draw(languages: _Windows, families: _Windows, family_of: np.ndarray) -> tuple[np.ndarray, int]:
    """Which window of a language each sample of the block fills: [BLOCK] int64; and how many
    samples lie outside their language's or their family's window.

    At every sample, of the languages whose own and whose family's window are open, the one with
    the earliest deadline, its own or its family's; within a family the earliest of its own.
    """
    # windows of languages in the order of families, so that both are [BLOCK] by family
    by_family = np.argsort(family_of[languages.member].astype(np.int16), kind="stable")
    opens, deadline = languages.opens()[by_family], languages.deadline[by_family]
    family = families.member
    apart = family * (BLOCK + 1)  # added to samples of the block, keeps families apart
    # the k-th sample of a family needs k open windows of its languages as well
    families_open = np.maximum(families.opens(), np.sort(apart + opens) - apart)
    shared = np.flatnonzero(np.bincount(family_of)[family] > 1)  # with other languages
    by_deadline = np.lexsort((deadline[shared], family[shared]))
    due = families.deadline
    for _ in range(_ROUNDS):
        turns = earliest_deadline_first(families_open, np.argsort(due, kind="stable"))
        # which sample of the block each sample of a family is, and the window that it fills
        sample = np.argsort(family[turns].astype(np.int16), kind="stable")
        filled = np.arange(BLOCK)
        if len(shared):  # in each family time goes from one of its samples to the next
            places = np.searchsorted((apart + sample)[shared], (apart + opens)[shared])
            filled[shared] = shared[earliest_deadline_first(places, by_deadline)]
        due, before = np.minimum(families.deadline, deadline[filled]), due
        if (due == before).all():
            break
    filled = by_family[filled]
    drawn = np.empty_like(filled)
    drawn[sample] = filled
    when = np.empty_like(sample)
    when[filled] = sample
    return drawn, languages.missed(when) + families.missed(sample)


def earliest_deadline_first(opens: np.ndarray, by_deadline: np.ndarray) -> np.ndarray:
    """Of n jobs that take one slot each, the job of each of n slots: [n] int64.

    opens [n]: the slot from which on a job may be done, n for none. by_deadline [n]: the jobs, the
    most urgent first. Where no open job is left, the next one to open is done early.
    """
    n = len(opens)
    urgency = np.empty(n, np.int64)  # n - 1 the most
    urgency[by_deadline] = np.arange(n - 1, -1, -1)
    # in order of time: the urgency of a job that opens, or -1 where a slot takes one
    opening = np.argsort(opens.astype(np.int16), kind="stable")
    slot = np.minimum(opens[opening], np.arange(n))  # the n-th to open must be there by slot n
    events = np.full(2 * n, -1)
    events[slot + np.arange(n)] = urgency[opening]
    open_now: list[int] = []  # ascending: a few dozen, for which this is faster than a heap
    done = []
    for event in events.tolist():
        if event < 0:
            done.append(open_now.pop())
        else:
            insort(open_now, event)
    return by_deadline[::-1][np.fromiter(done, np.int64, n)]
