"""How much of each language a run has asked for by sample n: stages, ramps and ends of supply.

Every stage gives each language a share of the samples. The asked amount x(n), a real number for
each language, is the integral of the shares from sample 0 to n; it adds up to n. A ramp changes the
shares linearly. When a language has given all the samples it may give (its epoch cap), the policy
decides: its share goes to others from there on, or the data ends.

All of it follows from the settings and the sizes of the stores, so nothing has to be kept: the
amounts at sample 10^10 cost what those at sample 10 cost.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.config import WhenExhausted


@dataclass(frozen=True)
class Stage:
    """Shares that hold from sample `start` on, reached linearly over `ramp` samples."""

    start: int
    ramp: int
    shares: np.ndarray  # [languages] float64, sum 1


@dataclass(frozen=True)
class _Segment:
    """Shares going linearly from `first` to `last` over `length` samples, then staying."""

    start: int
    asked: np.ndarray  # x(start), [languages]
    first: np.ndarray
    last: np.ndarray
    length: int  # 0: constant, first is last

    def at(self, n: int) -> np.ndarray:
        m = n - self.start
        if not self.length:
            return self.asked + m * self.first
        return self.asked + m * self.first + (self.last - self.first) * (m * m / 2 / self.length)

    def shares(self, n: int) -> np.ndarray:
        if not self.length:
            return self.first
        return self.first + (self.last - self.first) * ((n - self.start) / self.length)


class RatioSchedule:
    """x(n), the samples of each language asked for before sample n.

    stages: the first starts at sample 0 and has no ramp; starts increase, and no stage starts
    within the ramp of the one before. families: [languages], the number of each language's family.
    limits: [languages], samples a language may give in all (epoch cap x sequences), np.inf without
    a cap; must be whole numbers.

    end: the sample at which the data ends, None if it does not.
    exhausted: (sample, language) where limits were reached, in order; under `repeat` where they
    would be.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        families: np.ndarray,
        limits: np.ndarray,
        when_exhausted: WhenExhausted,
    ):
        self._families, self._limits, self._policy = families, limits, when_exhausted
        self._spent = np.zeros(len(families), bool)
        self.end: int | None = None
        self.exhausted: list[tuple[int, int]] = []
        self._segments: list[_Segment] = []
        for number, stage in enumerate(stages):
            until = stages[number + 1].start if number + 1 < len(stages) else None
            self._append_stage(stage, until)
            if self.end is not None:
                break
        self._starts = [segment.start for segment in self._segments]

    def asked(self, n: int) -> np.ndarray:
        """x(n) [languages], float64."""
        return self._segment(n).at(n)

    def shares(self, n: int) -> np.ndarray:
        """The share of each language at sample n [languages]."""
        return self._segment(n).shares(n)

    def knots(self, first: int, last: int) -> list[int]:
        """first, last and samples between, such that x is as good as straight from one to the next.

        Constant shares need none between; a ramp gets one every 16 samples, between which x departs
        from a straight line by 32 / its length at most.
        """
        low = bisect.bisect_right(self._starts, first) - 1
        high = bisect.bisect_left(self._starts, last)
        knots = {first, *self._starts[low + 1 : high], last}
        for segment in self._segments[low:high]:
            if segment.length:
                end = min(last, segment.start + segment.length)
                knots.update(range(max(first, segment.start), end, 16))
        return sorted(knots)

    def segments(self) -> list[tuple[int, int, np.ndarray]]:
        """(start, ramp length, shares at its end) of every stretch, caps included."""
        return [(s.start, s.length, s.last) for s in self._segments]

    def _segment(self, n: int) -> _Segment:
        return self._segments[bisect.bisect_right(self._starts, n) - 1]

    def _append_stage(self, stage: Stage, until: int | None) -> None:
        start = stage.start
        if start == 0:
            asked, before = np.zeros(len(self._families)), stage.shares
        else:
            asked, before = self._segments[-1].at(start), self._segments[-1].shares(start)
        if stage.ramp:
            start, asked = self._append(start, asked, before, stage.shares, stage.ramp, None)
            if self.end is not None:
                return
        self._append(start, asked, stage.shares, stage.shares, 0, until)

    def _append(
        self,
        start: int,
        asked: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
        length: int,
        until: int | None,
    ) -> tuple[int, np.ndarray]:
        """Adds a stretch, cut wherever a language is used up; returns its end and x there."""
        stop = start + length if length else until
        while True:
            first, last = self._redistribute(first), self._redistribute(last)
            segment = _Segment(start, asked, first, last, length)
            self._segments.append(segment)
            hit = self._first_exhaustion(segment, stop)
            if hit is None:
                end = start if stop is None else stop
                return end, segment.at(end)
            at, language = hit
            self._spent[language] = True
            self.exhausted.append((at, language))
            if self._policy is WhenExhausted.repeat:
                self._segments.pop()
                continue
            if self._policy is WhenExhausted.stop or not self._has_supply(segment.shares(at)):
                self.end = at
                return at, segment.at(at)
            if at == start:
                self._segments.pop()
            asked, first = segment.at(at), segment.shares(at)
            length = length - (at - start) if length else 0
            start = at

    def _first_exhaustion(self, segment: _Segment, stop: int | None) -> tuple[int, int] | None:
        """The last sample at which x stays within the limits, and whose limit comes then."""
        best: tuple[int, int] | None = None
        growing = ~self._spent & np.isfinite(self._limits)
        growing &= (segment.first > 0) | (segment.last > 0)
        for language in np.flatnonzero(growing).tolist():
            limit = self._limits[language]
            if segment.length:
                assert stop is not None
                if segment.at(stop)[language] <= limit:
                    continue
                low, high = segment.start, stop
                while high - low > 1:
                    middle = (low + high) // 2
                    if segment.at(middle)[language] <= limit:
                        low = middle
                    else:
                        high = middle
                at = low
            else:
                room = (limit - segment.asked[language]) / segment.first[language]
                at = segment.start + max(0, int(room))
                if stop is not None and at >= stop:
                    continue
            if best is None or at < best[0]:
                best = (at, language)
        return best

    def _has_supply(self, shares: np.ndarray) -> bool:
        return bool((shares[~self._spent] > 0).any())

    def _redistribute(self, shares: np.ndarray) -> np.ndarray:
        if self._policy is WhenExhausted.repeat or not self._spent.any():
            return shares
        shares = shares.copy()
        homeless = 0.0
        for family in np.unique(self._families[self._spent]):
            members = self._families == family
            freed = shares[members & self._spent].sum()
            shares[members & self._spent] = 0.0
            left = shares[members].sum()
            if left > 0:
                shares[members] *= (left + freed) / left
            else:
                homeless += freed
        total = shares.sum()
        return shares * ((total + homeless) / total) if total > 0 else shares
