"""Everything a sweep says about whether the law is the right one, as lines to print."""

import math

from data.scaling_law.alternatives import exponent_check, transfer_check
from data.scaling_law.fit_settings import FitSettings
from data.scaling_law.law import ScalingLaw
from data.scaling_law.mixing_law import compare_mixing_law, largest_group
from data.scaling_law.runs_table import RunsTable
from data.scaling_law.split_effect import SplitEffect, split_effects


def check_lines(
    table: RunsTable, law: ScalingLaw, settings: FitSettings | None = None
) -> list[str]:
    """A heading and lines for each check; where the runs do not allow one, why.

    table, settings: those `law` was fitted to and with. Runs that `settings` keep out of the fit
    stay out here too, but for the splits of the rest, which no fit is needed for.
    """
    settings = settings or FitSettings()
    fitted = table.where(row["purpose"] not in settings.without_purposes for row in table.rows)
    return [
        "One gamma at all sizes and lengths? (F-test: a small p says no)",
        *_indented(_exponents(fitted, settings)),
        "Does it matter which families share the rest? (per unit of ratio, in ln L)",
        *_indented(_transfer(fitted, law, settings)),
        "Losses of one family at one ratio under two splits of the rest, with 95 % intervals",
        *_indented(_splits(table)),
        "Error in ln L of runs left out, at the size and length most runs share",
        *_indented(_mixing(fitted, law)),
    ]


def _exponents(table: RunsTable, settings: FitSettings) -> list[str]:
    lines = [
        f"{family}: gamma {check.shared.gamma:.4f} ± {check.shared.std_error:.4f}, "
        + (
            f"spread {check.spread:.4f} over {check.shared.groups} groups, p={check.p_value:.2g}"
            if check.shared.groups > 1
            else "from one size and length only"
        )
        for family, check in exponent_check(table, settings).items()
    ]
    return lines or ["no two ratios at one size and length"]


def _transfer(table: RunsTable, law: ScalingLaw, settings: FitSettings) -> list[str]:
    try:
        checks = transfer_check(table, law.families, settings)
    except ValueError as error:
        return [str(error)]
    lines = []
    for family, check in checks.items():
        if math.isnan(check.p_value):
            lines.append(f"{family}: these runs cannot tell")
            continue
        effects = ", ".join(
            f"{name} {value:+.4f} ± {check.std_error[name]:.4f}"
            for name, value in check.effect.items()
        )
        lines.append(
            f"{family}: {effects}; p={check.p_value:.2g}; error of a run left out "
            f"{check.held_out_rms:.4f} without, {check.held_out_rms_with:.4f} with"
        )
    return lines


def _splits(table: RunsTable) -> list[str]:
    """The largest difference at each ratio, and how many of all are not 0."""
    alike: dict[tuple[str, float], list[SplitEffect]] = {}
    for effect in split_effects(table):
        alike.setdefault((effect.family, round(effect.ratio, 2)), []).append(effect)
    lines = []
    for pairs in alike.values():
        largest = max(pairs, key=lambda effect: abs(effect.difference))
        apart = sum(effect.low > 0 or effect.high < 0 for effect in pairs)
        many = f"; largest of {len(pairs)} pairs, of which {apart} exclude 0"
        lines.append(largest.line + (many if len(pairs) > 1 else ""))
    return lines or ["no such runs"]


def _mixing(table: RunsTable, law: ScalingLaw) -> list[str]:
    try:
        compared = compare_mixing_law(largest_group(table))
    except ValueError as error:
        return [str(error)]
    return [
        f"{family}: {one.power_held_out_rms:.4f} by p^-gamma, {one.held_out_rms:.4f} by the "
        f"data-mixing law ({one.rows} runs)"
        for family, one in compared.items()
        if family in law.families
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
