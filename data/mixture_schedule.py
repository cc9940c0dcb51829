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

So a block of 2048 samples is computed from its number alone, in about 10 ms, and any sample of any
run is found without an index. Languages and families stay within one sample of x at every n: at
the block borders by construction, in between in every mixture we have tried (the tests draw random
ones). Exceptions are languages that get less than one sample in a block: at the borders they are
rounded to the nearest number whatever their family's sum, and the others make up for it.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np

from data.ratio_schedule import RatioSchedule

# Long enough that most languages have a sample in it, short enough to be computed in no time.
# The stream depends on it: changing it makes old runs impossible to continue.
BLOCK = 2048
_ROUNDING = 1e-9  # x is a float: this much below a whole number counts as that number


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
            counts = counts + np.bincount(self._schedule(block)[:place], minlength=len(counts))
        return counts

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the samples BLOCK·number and on, [BLOCK] each: their languages, and how many samples
        of the same language come before each in the whole run (int64)."""
        languages = self._schedule(number)
        return languages, self.counts_at_border(number)[languages] + _ranks(languages)

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

    def _schedule(self, number: int) -> np.ndarray:
        """The languages of one block: [BLOCK] int64."""
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
        result = earliest_deadline_first(languages, families, self._family_of)
        missed = self._missed(result, languages, families)
        if missed:  # then from the end to the start: another valid order, which may miss none
            backwards = earliest_deadline_first(
                languages.reversed(), families.reversed(), self._family_of
            )[::-1]
            if self._missed(backwards, languages, families) < missed:
                return backwards
        return result

    def _missed(self, result: np.ndarray, languages: _Windows, families: _Windows) -> int:
        """How many samples lie outside their language's or family's window."""
        return languages.missed(result) + families.missed(self._family_of[result])


class _Windows:
    """When each sample of each member (language or family) should be drawn, in one block.

    release, deadline: [BLOCK] float64, in samples since the block's start, by member and number;
    member: [BLOCK]. A sample drawn as the i-th of the block (from 0) is within one sample of what
    is asked for if release < i + 1 and i < deadline.
    """

    def __init__(self, release: np.ndarray, deadline: np.ndarray, member: np.ndarray):
        self.release, self.deadline, self.member = release, deadline, member

    @classmethod
    def of(
        cls, time: np.ndarray, asked: np.ndarray, start: np.ndarray, stop: np.ndarray
    ) -> _Windows:
        """time [knots], asked [knots, members]; start and stop [members], drawn at either end."""
        jobs = stop - start
        member = np.repeat(np.arange(len(jobs)), jobs)
        within = np.arange(len(member)) - np.repeat(np.cumsum(jobs) - jobs, jobs)
        number = start[member] + within
        if len(time) == 2:
            grown = (asked[1] - asked[0])[member]
            # a language that is rounded to a sample which nothing asks for may be drawn any time
            slot = np.where(grown > 0, BLOCK / np.maximum(grown, 1e-300), np.inf)
            release = np.where(grown > 0, (number - asked[0][member]) * slot, -np.inf)
            return cls(release, release + slot, member)
        release, deadline = np.empty(len(member)), np.empty(len(member))
        for m in np.flatnonzero(jobs).tolist():
            mine, course = member == m, asked[:, m]
            release[mine] = np.interp(number[mine], course, time, left=-np.inf)
            deadline[mine] = np.interp(number[mine] + 1, course, time, right=np.inf)
        return cls(release, deadline, member)

    def reversed(self) -> _Windows:
        """The same windows with time running backwards."""
        return _Windows(BLOCK - self.deadline[::-1], BLOCK - self.release[::-1], self.member[::-1])

    def missed(self, members: np.ndarray) -> int:
        """How many samples lie outside their window if the block's members come in this order."""
        drawn = np.argsort(members, kind="stable")  # as the windows: by member, then in order
        early = self.release > drawn + 1 + _ROUNDING
        late = drawn > self.deadline + _ROUNDING
        return int((early | late).sum())


def earliest_deadline_first(
    languages: _Windows, families: _Windows, family_of_language: np.ndarray
) -> np.ndarray:
    """The languages of one block [BLOCK] int64.

    At every sample, of the languages whose own and whose family's window are open, the one with
    the earliest deadline, its own or its family's; within a family the earliest of its own.
    """
    order = np.lexsort((languages.deadline, languages.release))
    release = [*languages.release[order].tolist(), np.inf]
    deadline, language = languages.deadline[order].tolist(), languages.member[order].tolist()
    family_of = family_of_language.tolist()
    number_of_families = max(family_of) + 1
    opening = np.argsort(families.release, kind="stable")
    opens = [*families.release[opening].tolist(), np.inf]
    opening_family = families.member[opening].tolist()
    # each family's deadlines, the next one last; the first of all is for a family that is done
    closes: list[list[float]] = [[np.inf] for _ in range(number_of_families)]
    for family, closing in sorted(
        zip(families.member.tolist(), families.deadline.tolist(), strict=True), reverse=True
    ):
        closes[family].append(closing)

    ready: list[list[tuple[float, int]]] = [[] for _ in range(number_of_families)]  # heaps
    is_open = [0] * number_of_families  # windows that have opened, less samples drawn
    # the earlier of the deadlines of a family and of its most urgent language; kept up to date,
    # because looking at every family for every sample would take most of the time
    urgency = [np.inf] * number_of_families
    opened = waiting = 0
    result = []
    for now in range(1, BLOCK + 1):
        while opens[opened] < now:
            family = opening_family[opened]
            opened += 1
            is_open[family] += 1
            if is_open[family] == 1 and ready[family]:
                urgency[family] = min(ready[family][0][0], closes[family][-1])
        while release[waiting] < now:
            code = language[waiting]
            family = family_of[code]
            due = deadline[waiting]
            waiting += 1
            heappush(ready[family], (due, code))
            if is_open[family] > 0:
                closing = closes[family][-1]
                if closing < due:
                    due = closing
                if due < urgency[family]:
                    urgency[family] = due
        most_urgent = min(urgency)
        if most_urgent < np.inf:
            family = urgency.index(most_urgent)
            code = heappop(ready[family])[1]
        else:  # nobody's window is open in both respects: the nearest in one
            heads = [(heap[0][0], f) for f, heap in enumerate(ready) if heap]
            if heads:
                family = min(heads)[1]
                code = heappop(ready[family])[1]
            else:
                code = language[waiting]
                family = family_of[code]
                waiting += 1
        result.append(code)
        closes[family].pop()
        is_open[family] -= 1
        heap = ready[family]
        if heap and is_open[family] > 0:
            due, closing = heap[0][0], closes[family][-1]
            urgency[family] = due if due < closing else closing
        else:
            urgency[family] = np.inf
    return np.array(result, np.int64)


def _ranks(languages: np.ndarray) -> np.ndarray:
    """How many equal entries come before each: [n] int64."""
    order = np.argsort(languages, kind="stable")
    ordered = languages[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    ranks = np.empty(len(languages), np.int64)
    ranks[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return ranks
