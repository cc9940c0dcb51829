"""What a run will draw from its token stores, before it is launched and without torch.

    python -m data.plan STORES --steps 1000 --seq-length 2048 [data.mixture.alpha=0.5 ...]
    python -m data.plan --run runs/demo/DATE [train.train_steps=20000 ...]
    python -m launch.plan +experiment=demo [train.train_steps=20000 ...]

For each family and language: available tokens, planned tokens, epochs, the share of the samples
asked for and the share realised, and where supply ends; --json writes the same as a file, --plot
as a picture. Without STORES the text is data.corpus, tokenized into the cache folder as a launch
would do it.

Exit status: 0; 1 if the plan breaks an epoch cap or the data ends before the run; 2 for settings
that do not fit. The time it takes does not depend on the number of samples.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

from data.command_line import run_command, settings_of, stream_parser
from data.config import MixtureConfig, WhenExhausted
from data.language_mixture import LanguageMixture
from data.quantity import quantity
from data.stream_settings import StreamSettings, open_stream

_POINTS = 200  # along the run, for the picture of ratios that change


@dataclass(frozen=True)
class PlanRow:
    """A language, or a family as a whole (language "")."""

    family: str
    language: str
    tokens: int  # in the training store, end-of-document tokens included
    sequences: int  # in one epoch
    planned_samples: int  # exact: what the run will draw
    planned_tokens: int
    epochs: float  # passes over the text
    max_epochs: float | None  # the cap; None: none, or a family
    asked: float  # share of the samples by the settings: stages averaged, caps aside
    realised: float  # share of the samples drawn
    ends_at: int | None  # the sample at which the cap is reached, before the end of the run
    broken: bool  # more epochs than the cap; of a family: of one of its languages


@dataclass(frozen=True)
class Plan:
    samples: int  # asked for
    drawn: int  # fewer if the data ends before
    seq_length: int
    global_batch_size: int
    when_exhausted: str  # what happens at a cap
    stages: int
    rows: list[PlanRow]  # each family, and then its languages
    # (sample, share of each family there) along the run; empty where the shares never change
    course: list[tuple[int, dict[str, float]]]

    @property
    def ok(self) -> bool:
        return self.drawn == self.samples and not any(row.broken for row in self.rows)

    @property
    def families(self) -> list[PlanRow]:
        return [row for row in self.rows if not row.language]

    def languages_of(self, family: str) -> list[PlanRow]:
        return [row for row in self.rows if row.language and row.family == family]


def make_plan(
    mixture: LanguageMixture,
    rules: MixtureConfig,
    samples: int,
    *,
    global_batch_size: int,
    max_epochs: float | None = None,
) -> Plan:
    """The plan of the first `samples` samples of a mixture.

    rules: those the mixture was made with. max_epochs: a cap to hold every language against, where
    its own is not lower; it only judges, and changes no sample. Raises ValueError for fewer than 1
    sample.
    """
    if samples < 1:
        raise ValueError(f"a plan needs at least 1 sample, not {samples}")
    drawn = samples if mixture.end is None else min(samples, mixture.end)
    counts, asked = mixture.counts(drawn), _without_caps(mixture, rules).asked(drawn)
    ends_at: dict[str, int] = {}
    for at, code in mixture.exhausted():
        if at < samples:
            ends_at.setdefault(code, at)
    sequences = dict(zip(mixture.languages, map(len, mixture.sequences), strict=True))
    rows = []
    for family in mixture.families:
        stores = [s for s in mixture.stores if mixture.family_of[s.language] == family]
        members = []
        for store in sorted(stores, key=lambda store: -store.tokens):
            code = store.language
            epochs = counts[code] / sequences[code]
            if not mixture.packing.needs_plan:
                # a store shorter than a sequence fills one by repeating its text
                epochs *= max(1.0, mixture.seq_length / store.tokens)
            caps = [rules.language_max_epochs.get(code, rules.max_epochs), max_epochs]
            cap = min((cap for cap in caps if cap is not None), default=None)
            members.append(
                PlanRow(
                    family=family,
                    language=code,
                    tokens=store.tokens,
                    sequences=sequences[code],
                    planned_samples=counts[code],
                    planned_tokens=counts[code] * mixture.seq_length,
                    epochs=epochs,
                    max_epochs=cap,
                    asked=asked[code] / drawn if drawn else 0.0,
                    realised=counts[code] / drawn if drawn else 0.0,
                    ends_at=ends_at.get(code),
                    broken=cap is not None and epochs > cap * (1 + 1e-9),
                )
            )
        rows += [_family_row(family, members), *members]
    return Plan(
        samples=samples,
        drawn=drawn,
        seq_length=mixture.seq_length,
        global_batch_size=global_batch_size,
        when_exhausted=rules.when_exhausted.value,
        stages=1 + len(rules.stages),
        rows=rows,
        course=_course(mixture, drawn),
    )


def _course(mixture: LanguageMixture, samples: int) -> list[tuple[int, dict[str, float]]]:
    """Shares of the families at _POINTS places of the run; empty where they do not change."""
    if len(mixture.ratios.knots(0, samples)) == 2:
        return []
    course = []
    for sample in sorted({samples * i // _POINTS for i in range(_POINTS)}):
        shares = dict.fromkeys(mixture.families, 0.0)
        of_languages = mixture.ratios.shares(sample).tolist()
        for code, share in zip(mixture.languages, of_languages, strict=True):
            shares[mixture.family_of[code]] += share
        course.append((sample, shares))
    return course


def _without_caps(mixture: LanguageMixture, rules: MixtureConfig) -> LanguageMixture:
    """The same mixture with supply that never ends: what the settings ask for."""
    if rules.when_exhausted is WhenExhausted.repeat:
        return mixture
    return LanguageMixture(
        mixture.stores,
        mixture.seq_length,
        replace(rules, when_exhausted=WhenExhausted.repeat),
        mixture.seed,
        mixture.packing,
        mixture.family_of,
        mixture.plan_folder,
    )


def _family_row(family: str, members: list[PlanRow]) -> PlanRow:
    tokens = sum(r.tokens for r in members)
    return PlanRow(
        family=family,
        language="",
        tokens=tokens,
        sequences=sum(r.sequences for r in members),
        planned_samples=sum(r.planned_samples for r in members),
        planned_tokens=sum(r.planned_tokens for r in members),
        epochs=sum(r.epochs * r.tokens for r in members) / tokens,
        max_epochs=None,
        asked=sum(r.asked for r in members),
        realised=sum(r.realised for r in members),
        ends_at=None,
        broken=any(r.broken for r in members),
    )


def describe(plan: Plan) -> str:
    """The plan as a table of 100 columns."""
    steps = round(plan.samples / plan.global_batch_size, 1)
    lines = [
        f"{plan.samples:,} samples of {plan.seq_length:,} tokens = "
        f"{short(plan.samples * plan.seq_length)} tokens in {steps:,.12g} steps of "
        f"{plan.global_batch_size:,}",
        "",
        f"{'family, language':<20}{'available':>11}{'planned':>11}{'epochs':>10}{'cap':>7}"
        f"{'asked %':>12}{'realised %':>12}{'off':>8}",
        f"{'':<20}{'tokens':>11}{'tokens':>11}{'':>10}{'':>7}{'':>12}{'':>12}{'samples':>8}",
    ]
    for row in plan.rows:
        off = row.planned_samples - row.asked * plan.drawn
        name = f"  {row.language}" if row.language else row.family
        cap = f"{row.max_epochs:g}" if row.max_epochs is not None else ""
        lines.append(
            f"{name:<20.20}{short(row.tokens):>11}{short(row.planned_tokens):>11}"
            f"{row.epochs:>10.4g}{cap:>7}{100 * row.asked:>12.6f}{100 * row.realised:>12.6f}"
            f"{_off(off):>8}{_remark(row)}"
        )
    tokens = sum(row.tokens for row in plan.families)
    planned = sum(row.planned_tokens for row in plan.families)
    epochs = sum(row.epochs * row.tokens for row in plan.families) / tokens
    lines.append(
        f"{'all':<20}{short(tokens):>11}{short(planned):>11}{epochs:>10.4g}"
        f"{'':>7}{100 * sum(r.asked for r in plan.families):>12.6f}"
        f"{100 * sum(r.realised for r in plan.families):>12.6f}"
    )
    return "\n".join([*lines, *_verdict(plan)])


def short(number: float) -> str:
    """1234567 -> 1.235M: four digits, to be read and not to be reckoned with."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.99995:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _off(samples: float) -> str:
    # what the settings ask for is a real number, what is drawn are whole samples
    return (
        f"{samples:+.2f}"
        if abs(samples) < 1000
        else ("-" if samples < 0 else "+") + short(abs(samples))
    )


def _remark(row: PlanRow) -> str:
    if not row.language:
        return ""
    if row.broken:
        return "  CAP BROKEN"
    if row.ends_at is not None:
        return f"  cap reached at sample {row.ends_at:,}"
    return "  never drawn" if not row.planned_samples else ""


def _verdict(plan: Plan) -> list[str]:
    lines = [""]
    if plan.stages > 1:
        lines.append(f"Ratios change over {plan.stages} stages; asked % is their average.")
    reached = [row for row in plan.rows if row.language and row.ends_at is not None]
    if reached and plan.when_exhausted == WhenExhausted.redistribute.value:
        lines.append(
            f"{_languages(len(reached), 'reach')} the cap; the share goes to others from there on."
        )
    ends, beyond = shortfalls(plan)
    lines += ends + beyond
    if plan.ok:
        capped = any(row.max_epochs is not None for row in plan.rows)
        lines.append(
            "No epoch cap is broken."
            if capped
            else "No epoch cap is set (data.mixture.max_epochs)."
        )
    return lines


def shortfalls(plan: Plan) -> tuple[list[str], list[str]]:
    """A line each where the data ends before the run, and where languages go beyond their caps."""
    ends, beyond = [], []
    if plan.drawn < plan.samples:
        steps = plan.drawn // plan.global_batch_size
        shorter = f"train.train_steps={steps} or less" if steps else "more text"
        redistributed = plan.when_exhausted == WhenExhausted.redistribute.value
        ends.append(
            f"The data ends at sample {plan.drawn:,} of {plan.samples:,}, in step "
            f"{steps + 1:,}: "
            + (
                f"every language that is drawn has reached its cap. Use {shorter}, or raise "
                "data.mixture.max_epochs."
                if redistributed
                else f"a language has reached its cap. Use {shorter}, raise "
                "data.mixture.max_epochs, or set data.mixture.when_exhausted=redistribute."
            )
        )
    broken = [row for row in plan.rows if row.language and row.broken]
    if broken:
        worst = max(broken, key=lambda row: row.epochs / (row.max_epochs or 1))
        beyond.append(
            f"{_languages(len(broken), 'go')} beyond the cap, most of all "
            f"{worst.language}: {worst.epochs:.4g} epochs, {worst.max_epochs:g} allowed. Give it "
            "a lower share in data.mixture, lower train.train_steps, or raise the cap, "
            f"data.mixture.language_max_epochs.{worst.language} or data.mixture.max_epochs."
        )
    return ends, beyond


def _languages(number: int, verb: str) -> str:
    one = {"reach": "reaches", "go": "goes"}[verb]
    return f"{number} languages {verb}" if number > 1 else f"1 language {one}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON types."""
    return {"ok": plan.ok, "tokens": plan.samples * plan.seq_length} | asdict(plan)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """--json, --plot and --max-epochs, for this program and launch.plan."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the plan")
    parser.add_argument(
        "--max-epochs",
        type=float,
        metavar="N",
        help="exit with 1 if a language is drawn more often; changes nothing that is drawn",
    )


def show(
    settings: StreamSettings, samples: int, given: argparse.Namespace, *, sparse: bool = False
) -> int:
    """Makes the plan, prints it and writes what is asked for; returns the exit status.

    sparse: whether the run's model has experts, which data.mixture.law knows nothing of.
    """
    started = time.perf_counter()
    mixture = open_stream(settings).mixture
    unlike = _unlike_law(mixture, settings.data.mixture.law, sparse)
    plan = make_plan(
        mixture,
        settings.data.mixture,
        samples,
        global_batch_size=settings.global_batch_size,
        max_epochs=given.max_epochs,
    )
    print("\n".join([describe(plan), *unlike]))
    print(f"Planned in {1000 * (time.perf_counter() - started):.0f} ms.")
    if given.json:
        _write(given.json, json.dumps(as_json(plan), indent=1, ensure_ascii=False) + "\n")
    if given.plot:
        from data.plan_plot import plot_plan  # matplotlib takes a second to import

        plot_plan(plan, given.plot)
        print(f"Drawn in {given.plot}.")
    return 0 if plan.ok else 1


def _unlike_law(mixture: LanguageMixture, law: str, sparse: bool) -> list[str]:
    """How the run is unlike those that data.mixture.law was fitted to. Raises ValueError."""
    if not law:
        return []
    from data.mixture_law import differences, open_law_of  # only runs with a law need it

    found = differences(open_law_of(mixture, law), mixture, sparse=sparse)
    return [f"data.mixture.law={law} is used outside of its fit: {line}" for line in found]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def whole_number(text: str) -> int:
    """10000000000, 1e10 or 10G."""
    try:
        value = quantity("", text) if text.strip() != "0" else 0  # whose rule stands elsewhere
    except ValueError:
        value = 0.5
    if value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text}: must be a whole number above 0, such as 20000, 1e10 or 10k"
        )
    return int(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = stream_parser("python -m data.plan", __doc__)
    parser.add_argument("--mixture", type=Path, metavar="FILE.yaml", help="stands for data.mixture")
    parser.add_argument("--global-batch-size", type=int, metavar="N", help="sequences in a step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole_number, metavar="N", help="train.train_steps")
    length.add_argument("--samples", type=whole_number, metavar="N", help="sequences in the run")
    length.add_argument("--tokens", metavar="N", help="tokens in the run, as in 300B or 1e12")
    add_output_arguments(parser)
    given = parser.parse_intermixed_args(arguments)

    def command() -> int:
        settings = settings_of(given, {"train.train_steps": given.steps})
        if given.samples is not None:
            samples = given.samples
        elif given.tokens is not None:
            samples = round(quantity("--tokens", given.tokens) / settings.seq_length)
        elif settings.train_steps is not None:
            samples = settings.train_steps * settings.global_batch_size
        else:
            raise ValueError(
                "how long is the run? add --steps, --samples or --tokens, or train.train_steps=N"
            )
        return show(settings, samples, given)

    return run_command("python -m data.plan", command)


if __name__ == "__main__":
    sys.exit(main())
