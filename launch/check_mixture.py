"""What the stream of samples gives a run: is it enough, and does the scaling law know it?"""

from data.config import RatioUnit, Weighting
from data.language_mixture import LanguageMixture
from data.plan import Plan, make_plan, shortfalls
from launch.findings import Findings
from models.parameter_count import parameter_count
from pretrain.config import PretrainConfig

TOPIC = "data"
# passes over a language, above which we speak up
_MANY_EPOCHS = 40


def check_mixture(
    config: PretrainConfig, mixture: LanguageMixture, vocab_size: int | None, findings: Findings
) -> None:
    """Looks at supply and epochs for the steps planned, and at data.mixture.law.

    vocab_size: the model's, before padding; None: not known.
    """
    _supply(config, mixture, findings)
    if config.data.mixture.law:
        _law(config, mixture, vocab_size, findings)


def _supply(config: PretrainConfig, mixture: LanguageMixture, findings: Findings) -> None:
    rules, train = config.data.mixture, config.train
    samples = train.train_steps * train.global_batch_size
    plan = make_plan(mixture, rules, samples, global_batch_size=train.global_batch_size)
    ends, beyond = shortfalls(plan)
    findings.errors(TOPIC, ends)
    findings.warnings(TOPIC, beyond)
    repeated, never = _odd_rows(plan)
    if config.data.corpus or config.data.store_dir:
        findings.warnings(TOPIC, [*repeated, *never])
    else:
        findings.notes(TOPIC, [*repeated, *never])
    tokens = samples * mixture.seq_length
    findings.warnings(
        TOPIC,
        [
            f"data.mixture.stages[{number}].from_tokens={stage.from_tokens} is beyond the "
            f"{tokens:,} tokens of the run (train.train_steps={train.train_steps}): the stage "
            "never begins; it counts tokens, not steps"
            for number, stage in enumerate(rules.stages)
            if stage.from_tokens >= tokens
        ],
    )
    budget = rules.budget
    in_tokens = rules.weighting is Weighting.unimax and rules.unit is RatioUnit.tokens
    if in_tokens and budget and not 0.5 <= budget / tokens <= 2:
        findings.warnings(
            TOPIC,
            [
                f"data.mixture.budget={budget:g} is not what the run draws, {tokens} tokens: "
                f"ratios are made for another run; use data.mixture.budget={tokens}"
            ],
        )


def _odd_rows(plan: Plan) -> tuple[list[str], list[str]]:
    """What is said of languages repeated many times, and of those never drawn."""
    languages = [row for row in plan.rows if row.language]
    often = sorted(
        (row for row in languages if row.epochs > _MANY_EPOCHS and not row.broken),
        key=lambda row: -row.epochs,
    )
    repeated = []
    if often:
        most = ", ".join(f"{row.language} {row.epochs:,.0f} times" for row in often[:5])
        repeated.append(
            f"{len(often)} of {len(languages)} languages are drawn more than {_MANY_EPOCHS} times "
            f"over in {plan.samples:,} samples: {most}; plan fewer steps, give more text, or set "
            "data.mixture.max_epochs and data.mixture.when_exhausted=redistribute"
        )
    never = [row.language for row in languages if row.asked > 0 and not row.planned_samples]
    return repeated, [
        f"{', '.join(never)}: never drawn in {plan.samples:,} samples, because the share is less "
        "than one sample; raise the ratio, or leave out with data.mixture.drop_languages"
    ] * bool(never)


def _law(
    config: PretrainConfig, mixture: LanguageMixture, vocab_size: int | None, findings: Findings
) -> None:
    """What the run will say of data.mixture.law when it starts: errors, and how it is unlike the
    runs that the law was fitted to."""
    from data.mixture_law import differences, open_law_of  # numpy and scipy, for a law only
    from pretrain.predicted_losses import PredictedLosses
    from pretrain.train_state import TrainState

    path, train = config.data.mixture.law, config.train
    try:
        law = open_law_of(mixture, path)
    except ValueError as error:
        findings.errors(TOPIC, [str(error)])
        return
    unlike = differences(law, mixture, sparse=bool(config.model.moe.num_experts))
    if vocab_size is not None:
        number = parameter_count(config.model, vocab_size).non_embedding
        predictions = PredictedLosses(law, mixture, number, unlike)
        unlike = predictions.end_point(
            TrainState(), train.train_steps, train.global_batch_size
        ).warnings
    findings.warnings(
        TOPIC, [f"data.mixture.law={path} is used outside of its fit: {line}" for line in unlike]
    )
