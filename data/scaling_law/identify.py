"""Can these runs determine the law at all? If not: which runs are missing, in words.

Counted, for every family (`levels`: different values; a and b are free parameters):

    rows         more than free parameters, or nothing is left to judge the fit by
    gamma        2 ratios or more; 3 show whether ln L is straight in ln p
    A, alpha     one more size than free ones among the two: E + A / N^alpha through 3 sizes
    B, beta      the same with training lengths
    E set        spares one size or one length, since the level of the losses is then known

Counting does not see designs where sizes, lengths and ratios move together (tokens always 20 times
the parameters, one ratio for each size). So the derivatives of ln L with respect to all free
parameters are also taken at a plain law (alpha = beta, every term a third of the bracket) and must
be linearly independent.
"""

from collections.abc import Collection, Mapping

import numpy as np

from data.scaling_law.huber_fit import ALPHA, BETA, GAMMA, PARAMETERS, Model, Rows
from data.scaling_law.runs_table import levels

SAME_SIZE, SAME_RATIO = 0.02, 0.05  # relative steps below which two runs count as equal
# smallest over largest singular value of the derivatives, each scaled to length 1
DEPENDENT = 1e-5
# found for English text (arXiv 2203.15556 section 3.3): what to fix exponents at if need be
CHINCHILLA = {"alpha": 0.34, "beta": 0.28}


class UnderdeterminedError(ValueError):
    """The runs do not determine the law.

    missing: a line for each thing that is. enough: parameters which, if fixed at these values
    (`FitSettings.fixed`), leave a law that the runs do determine; None where there is none.
    """

    def __init__(self, missing: list[str], enough: Mapping[str, float] | None) -> None:
        self.missing = missing
        self.enough = None if enough is None else dict(enough)
        ways = "Add such runs to the sweep"
        if enough:
            said = ", ".join(f"{name}: {value:g}" for name, value in enough.items())
            ways += f", or fit a reduced law with fixed={{{said}}}"
        super().__init__(
            "the runs do not determine the law:\n"
            + "\n".join(f"- {line}" for line in missing)
            + f"\n{ways}"
        )


def missing_runs(rows_of: Mapping[str, Rows], fixed: Mapping[str, float]) -> list[str]:
    """A line for each thing that lacks, of `rows_of` families; empty where nothing does."""
    families: dict[str, list[str]] = {}  # line -> whom it is about
    for family, rows in rows_of.items():
        for line in dict.fromkeys(lacking(rows, fixed)):
            families.setdefault(line, []).append(family)
    return [f"{', '.join(names)}: {line}" for line, names in families.items()]


def lacking(rows: Rows, fixed: Mapping[str, float]) -> list[str]:
    """A line for each thing that one family's rows lack; empty where they determine its law."""
    if not len(rows.log_loss):
        return ["there are no runs"]
    return _counts(rows, fixed) or _dependent(rows, fixed)


def reduction(rows_of: Mapping[str, Rows], fixed: Mapping[str, float]) -> dict[str, float] | None:
    """The mildest further `fixed` that the runs suffice for, or None."""
    for extra in (
        {"alpha": CHINCHILLA["alpha"]},
        {"beta": CHINCHILLA["beta"]},
        CHINCHILLA,
        {"A": 0.0},
        {"B": 0.0},
        {"A": 0.0, "beta": CHINCHILLA["beta"]},
        {"B": 0.0, "alpha": CHINCHILLA["alpha"]},
        {"A": 0.0, "B": 0.0},
    ):
        tried = {**fixed, **extra}
        if not missing_runs(rows_of, tried):
            return tried
    return None


def free_parameters(fixed: Collection[str]) -> list[str]:
    """What is left to fit; without its term an exponent is not."""
    gone = {*fixed, *(["alpha"] if "A" in fixed else []), *(["beta"] if "B" in fixed else [])}
    return [name for name in PARAMETERS if name not in gone]


def model_of(fixed: Mapping[str, float]) -> Model:
    """The regression in which these are set."""
    free = np.isin(PARAMETERS, free_parameters(fixed))
    values = np.zeros(6)
    for name, value in fixed.items():
        place = PARAMETERS.index(name)
        if name in ("E", "A", "B"):
            values[place] = np.log(value) if value > 0 else -np.inf
        else:
            values[place] = value
    return Model(free, values)


def trade_offs(model: Model, rows: Rows, theta: np.ndarray) -> list[list[str]]:
    """Groups of parameters whose changes these rows cannot tell apart near `theta` [6]."""
    jacobian = model.jacobian(theta, rows)[1][:, model.free]
    names = np.array(PARAMETERS)[model.free]
    length = np.linalg.norm(jacobian, axis=0)
    there = length > 1e-9 * np.sqrt(len(jacobian))  # a term that has vanished is told elsewhere
    _, values, directions = np.linalg.svd(jacobian[:, there] / length[there], full_matrices=True)
    values = np.pad(values, (0, len(directions) - len(values)))
    return [
        [str(name) for name in names[there][np.abs(direction) > 0.05]]
        for value, direction in zip(values, directions, strict=True)
        if value <= DEPENDENT * values[0]
    ]


def _counts(rows: Rows, fixed: Mapping[str, float]) -> list[str]:
    free, count = free_parameters(fixed), len(rows.log_loss)
    sizes = levels(np.exp(rows.log_n + rows.log_n0), SAME_SIZE)
    lengths = levels(np.exp(rows.log_d + rows.log_d0), SAME_SIZE)
    ratios = levels(np.exp(rows.log_p), SAME_RATIO)
    found = []
    if "gamma" in free and len(ratios) < 2:
        found.append(
            "gamma needs runs of at least 2 (better 3) different ratios at one size and length; "
            f"all {count} have ratio {ratios[0]:.3g}. Add one at e.g. "
            f"{_another_ratio(ratios[0]):.3g}, with num_parameters and tokens of one there is"
        )
    short = {}
    for what, values, pair in (
        ("sizes", sizes, "A alpha"),
        ("training lengths", lengths, "B beta"),
    ):
        wanted = sum(name in free for name in pair.split())
        short[what] = (max(wanted + 1 - len(values), 0) if wanted else 0, values, pair, wanted + 1)
    spare = 0 if "E" in free else 1
    if sum(item[0] for item in short.values()) > spare:
        for what, (lacking, values, pair, wanted) in short.items():
            if lacking:
                named = " and ".join(name for name in pair.split() if name in free)
                column = "num_parameters" if what == "sizes" else "tokens"
                found.append(
                    f"{named} need runs of {wanted} {what}, there are {len(values)} ({column}="
                    f"{', '.join(f'{value:.4g}' for value in values)}). Add {lacking} more, a "
                    "factor of 2 or more apart"
                )
    if not found and count <= len(free):
        found.append(
            f"{count} runs for {len(free)} free parameters ({', '.join(free)}); at "
            f"least {len(free) + 1} are needed, and twice as many tell more than noise"
        )
    return found


def _dependent(rows: Rows, fixed: Mapping[str, float]) -> list[str]:
    model = model_of(fixed)
    theta = np.where(model.free, _plain_law(fixed), model.values)
    lines = []
    for names in trade_offs(model, rows, theta):
        sizes, lengths = {"A", "alpha"} & set(names), {"B", "beta"} & set(names)
        if "gamma" in names:
            way = "add runs of 2 or more different ratios at one size and length"
        elif sizes and lengths:
            way = "add a size at a training length that another size was trained for already"
        else:
            way = "spread sizes and training lengths further apart"
        lines.append(
            f"{', '.join(names)} cannot be told apart: in these runs they move together; {way}"
        )
    return lines


def _plain_law(fixed: Mapping[str, float]) -> np.ndarray:
    theta = np.zeros(6)
    exponent = fixed.get("alpha", fixed.get("beta", 0.3))  # of both, if it can be
    theta[[ALPHA, BETA, GAMMA]] = exponent, exponent, 0.1
    return theta


def _another_ratio(ratio: float) -> float:
    return ratio / 2 if ratio > 0.5 else ratio * 2
