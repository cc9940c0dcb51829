"""How often to draw each language pair of a collection of parallel text.

    sinkhorn_temperature    Sinkhorn-Knopp, then a temperature, as public fairseq-derived code does
    max_entropy             the most even pairs that give each language its ratio
    min_kl                  the pairs nearest to the counts that give each language its ratio

The last two are one algorithm, iterative proportional fitting (Deming and Stephan 1940), from
different starts. XY-LENT (arXiv 2210.14867) asks of its sampling that it should leave no pair out,
which both fulfil; its own equations were not at hand, and neither is claimed to be them.

Directed pairs everywhere: (source, target). Results sum to 1 over all of them.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

Pair = tuple[str, str]

TOLERANCE = 1e-12  # of every marginal of the result
MAX_ITERATIONS = 200_000  # each costs some 10 µs at 100 languages
_SLACK = 1e-13  # what counts as nothing in the flow, below the tolerance


def max_entropy(pairs: Iterable[Pair], marginals: Mapping[str, float]) -> dict[Pair, float]:
    """The joint distribution of highest entropy on these pairs whose two marginals are as given.

    pairs: undirected, each named once; both directions are drawn, equally often. marginals: the
    ratio of each language among the sources, and among the targets. Every pair gets a positive
    weight, unless the marginals leave it none (a language with ratio 1/2 must take part in every
    pair, so pairs without it get 0).

    Raises ValueError for a pair of one language with itself, a pair named twice, marginals that do
    not sum to 1 or lack a language, and for marginals that no weights of these pairs can give:
    without pairs of a language with itself none may exceed 1/2, and the ratio of any group of
    languages may not exceed that of the languages they have pairs with.
    """
    return _fit_undirected(dict.fromkeys(_once(pairs), 1.0), marginals)


def min_kl(counts: Mapping[Pair, float], marginals: Mapping[str, float]) -> dict[Pair, float]:
    """The joint distribution nearest to the counts, in KL(result || counts), with these marginals.

    counts: positive, of undirected pairs, each named once. Otherwise, and in what is raised, as
    `max_entropy`, which this is where all counts are equal.
    """
    _once(counts)
    return _fit_undirected(counts, marginals)


def sinkhorn_temperature(counts: Mapping[Pair, float], temperature: float) -> dict[Pair, float]:
    """Counts scaled to a doubly stochastic matrix, to the power 1/temperature, divided by the sum.

    As public fairseq-derived code does it, where arXiv 2010.11125 (§3.4) describes an optimisation
    instead. The scaling gives all languages equal marginals and respects how much of each pair
    there is; the power evens the pairs out, after which the marginals are equal only roughly.
    counts: directed; give both directions where both are drawn. Languages that are never source
    have no row and those that are never target no column; if the two numbers differ, rows sum to 1
    and columns to rows / columns. A pair that equal marginals leave nothing gets 0, where code that
    stops after some iterations leaves it a little.

    Raises ValueError for a temperature not above 0, counts not above 0, and for pairs that no
    weights bring to equal marginals, naming the languages that have too few partners.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0 (1 leaves the scaled counts)")
    _check_counts(counts)
    sources = sorted({source for source, _ in counts})
    targets = sorted({target for _, target in counts})
    start = np.zeros((len(sources), len(targets)))
    for (source, target), count in counts.items():
        start[sources.index(source), targets.index(target)] = count
    fitted = fit_to_marginals(
        start,
        np.full(len(sources), 1 / len(sources)),
        np.full(len(targets), 1 / len(targets)),
        sources,
        targets,
    )
    weights = fitted ** (1 / temperature)
    weights /= weights.sum()
    return {(s, t): float(weights[sources.index(s), targets.index(t)]) for s, t in counts}


def fit_to_marginals(
    start: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    row_names: list[str],
    column_names: list[str],
) -> np.ndarray:
    """The matrix nearest to `start` [r, c] in relative entropy with row sums [r] and column sums
    [c], by iterative proportional fitting; 0 where `start` is 0.

    Stops when every row and column sum is right within 1e-12. Entries that are 0 under every matrix
    with these sums are taken out first: the iteration would approach them for ever. Raises
    ValueError where there is no such matrix, naming rows that ask for more than their columns have,
    and where 200 000 iterations are not enough.
    """
    support = _entries_that_can_be_positive(start > 0, rows, columns, row_names, column_names)
    fitted = np.where(support, start, 0.0)
    fitted = fitted / fitted.sum()
    worst = np.inf
    for _ in range(MAX_ITERATIONS):
        fitted *= _ratio(rows, fitted.sum(1))[:, None]
        fitted *= _ratio(columns, fitted.sum(0))
        worst = float(abs(fitted.sum(1) - rows).max())  # the columns are right by construction
        if worst <= TOLERANCE:
            return fitted
    row = row_names[int(abs(fitted.sum(1) - rows).argmax())]
    raise ValueError(
        f"pair weights have not converged in {MAX_ITERATIONS} iterations: the ratio of {row} is "
        f"off by {worst:.1e}; the counts or ratios differ by too many orders of magnitude"
    )


def _fit_undirected(
    counts: Mapping[Pair, float], marginals: Mapping[str, float]
) -> dict[Pair, float]:
    _check_counts(counts)
    same = sorted(source for source, target in counts if source == target)
    if same:
        raise ValueError(f"pairs of a language with itself: {', '.join(same)}; leave them out")
    missing = sorted({name for pair in counts for name in pair} - set(marginals))
    if missing:
        raise ValueError(f"no ratio is given for {', '.join(missing)}, which have pairs")
    total = sum(marginals.values())
    if not abs(total - 1) <= 1e-6 or any(p < 0 for p in marginals.values()):
        raise ValueError(
            f"the languages' ratios {dict(marginals)} sum to {total:.8g}; they must be at least 0 "
            "and sum to 1"
        )
    names = sorted(name for name, p in marginals.items() if p > 0)
    ratios = np.array([marginals[name] / total for name in names])
    for name, ratio in zip(names, ratios, strict=True):
        # 1e-9: a half that was computed
        if ratio > 0.5 + 1e-9:
            raise ValueError(
                f"the ratio of {name} is {ratio:.6g}, above 1/2: each pair it is in has another "
                "language too, so it is never in more than half of all places; lower it"
            )
    start = np.zeros((len(names), len(names)))
    for (source, target), count in counts.items():
        if source in names and target in names:
            i, j = names.index(source), names.index(target)
            start[i, j] = start[j, i] = count
    fitted = fit_to_marginals(start, ratios, ratios, names, names)
    fitted = (fitted + fitted.T) / 2  # the same up to the last bits
    weights: dict[Pair, float] = {}
    for source, target in counts:
        drawn = source in names and target in names
        weight = float(fitted[names.index(source), names.index(target)]) if drawn else 0.0
        weights[source, target] = weights[target, source] = weight
    return weights


def _entries_that_can_be_positive(
    support: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    row_names: list[str],
    column_names: list[str],
) -> np.ndarray:
    """The part of the support that some matrix with these marginals uses, as a mask [r, c].

    A matrix with these marginals is a flow of rows to columns that fills both. If the largest flow
    does not, the rows reachable from what is left over ask for more than their columns have (the
    minimum cut), and the error names them. If it does, an entry can be positive exactly if it is,
    or if flow can be moved into it around a circle.
    """
    flow, reachable = _largest_flow(support, rows, columns)
    if reachable.any():
        partners = support[reachable].any(0)
        asking = [name for name, r in zip(row_names, reachable, strict=True) if r]
        having = [name for name, p in zip(column_names, partners, strict=True) if p]
        raise ValueError(
            f"no weights of the pairs give these ratios: {', '.join(asking)} together have "
            f"{rows[reachable].sum():.6g}, but only pairs with {', '.join(having) or 'nobody'}, "
            f"together {columns[partners].sum():.6g}; lower the former, raise the latter, or add "
            "pairs"
        )
    # row i -> column j where there is a pair; column j -> row i where there is flow to take back
    size = len(rows) + len(columns)
    step = np.eye(size, dtype=bool)
    step[: len(rows), len(rows) :] = support
    step[len(rows) :, : len(rows)] = (flow > _SLACK).T
    connected = step
    while True:
        further = connected.astype(np.float32) @ connected.astype(np.float32) > 0
        if (further == connected).all():
            break
        connected = further
    return support & connected[len(rows) :, : len(rows)].T


def _largest_flow(
    support: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A largest flow [r, c] on the support, and which rows [r] are reached from unmet ones.

    Augments along shortest paths (Edmonds and Karp 1972), all rows of one distance at a time.
    """
    flow = np.zeros(support.shape)
    unmet, room = rows.astype(float).copy(), columns.astype(float).copy()
    while True:
        from_column = np.full(len(rows), -1)  # by which column a row was reached
        from_row = np.full(len(columns), -1)
        row_seen = unmet > _SLACK
        column_seen = np.zeros(len(columns), bool)
        front = np.flatnonzero(row_seen)
        end = -1
        while len(front) and end < 0:
            new = support[front].any(0) & ~column_seen
            if not new.any():
                break
            from_row[new] = front[support[front][:, new].argmax(0)]
            column_seen |= new
            open_columns = np.flatnonzero(new & (room > _SLACK))
            if len(open_columns):
                end = int(open_columns[0])
                break
            back = flow[:, new] > _SLACK
            rows_new = back.any(1) & ~row_seen
            from_column[rows_new] = np.flatnonzero(new)[back[rows_new].argmax(1)]
            row_seen |= rows_new
            front = np.flatnonzero(rows_new)
        if end < 0:
            return flow, row_seen
        path = [(int(from_row[end]), end)]
        while from_column[path[-1][0]] >= 0:
            column = int(from_column[path[-1][0]])
            path.append((int(from_row[column]), column))
        taken_back = [(row, column) for (row, _), (_, column) in pairwise(path)]
        amount = min(
            [unmet[path[-1][0]], room[end]] + [flow[row, column] for row, column in taken_back]
        )
        for row, column in path:
            flow[row, column] += amount
        for row, column in taken_back:
            flow[row, column] -= amount
        unmet[path[-1][0]] -= amount
        room[end] -= amount


def _ratio(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    return np.divide(wanted, found, out=np.zeros_like(wanted), where=found > 0)


def _check_counts(counts: Mapping[Pair, float]) -> None:
    if not counts:
        raise ValueError("there are no pairs")
    bad = {pair: count for pair, count in counts.items() if not 0 < count < float("inf")}
    if bad:
        raise ValueError(f"counts of {bad}: must be finite numbers above 0; leave empty pairs out")


def _once(pairs: Iterable[Pair]) -> list[Pair]:
    pairs = list(pairs)
    seen: set[frozenset[str]] = set()
    for pair in pairs:
        if frozenset(pair) in seen:
            raise ValueError(f"the pair {'-'.join(pair)} is given twice, perhaps in both orders")
        seen.add(frozenset(pair))
    return pairs
