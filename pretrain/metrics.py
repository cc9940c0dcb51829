"""Every metric a run can log: its name, unit, meaning, where it is computed, how it is charted.

The one table. docs/metrics.md is made of it (`python -m pretrain.metrics > docs/metrics.md`), W&B's
axes and the dashboard of `launch.dashboard` too, and tests hold runs to it. All metrics are logged
against the optimizer step. Imports neither torch nor megatron-core.

In a name, <word> stands for any text: eval/family/<family>/loss is eval/family/slavic/loss and the
like.
"""

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache


class Section(Enum):
    """Parts of a dashboard or report, in their order; the value is the title."""

    loss = "Loss"
    languages = "Languages and families"
    mixture = "Mixture"
    optimizer = "Optimizer"
    throughput = "Throughput"
    routing = "Routing"
    health = "Health"


class Axis(Enum):
    """What a metric is best drawn over."""

    step = "step"
    tokens = "train/consumed_tokens"


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str  # "" for a pure number
    meaning: str
    computed_in: str  # file
    section: Section
    chart: str  # title; metrics of one title share a chart
    logged: str  # when
    axis: Axis = Axis.step
    best: str = ""  # "min" or "max": which of its values a summary of the run should keep
    needs: str = ""  # what a run must have for it: "experts", ...

    @property
    def pattern(self) -> str:
        """A regular expression for the whole of the name, as Python, JavaScript and Go read it."""
        parts = re.split(r"<\w+>", self.name)
        return "^" + ".+".join(part.replace(".", r"\.") for part in parts) + "$"

    @property
    def is_pattern(self) -> bool:
        return "<" in self.name


@dataclass(frozen=True)
class Chart:
    title: str
    section: Section
    axis: Axis
    metrics: tuple[Metric, ...]


_LOG, _EVAL = "every `train.log_interval`", "at evaluations"
_MIXTURE = "every `train.mixture_interval`"
_NORMS = "every `train.gradient_norm_interval`"
_ROUTER = "every `train.router_health_interval`, and when a run ends or is stopped"
_TIMES = "every `profile.straggler_interval`"
_SAVE = "when a checkpoint was saved"

_LOSS = "nats per token"
PREDICTED = "Predicted loss by family"


def _loss(name: str, meaning: str, section: Section, chart: str, logged: str) -> Metric:
    return Metric(
        name, _LOSS, meaning, "pretrain/loss.py", section, chart, logged, Axis.tokens, best="min"
    )


def _predicted(name: str, meaning: str, chart: str, unit: str = _LOSS) -> Metric:
    where = "pretrain/predicted_losses.py"
    return Metric(
        f"eval/family/<family>/{name}",
        unit,
        meaning,
        where,
        Section.languages,
        chart,
        f"{_EVAL}, from the first token on",
        Axis.tokens,
        needs="`data.mixture.law`",
    )


def _mixture(name: str, unit: str, meaning: str, chart: str) -> Metric:
    where = "pretrain/mixture_report.py"
    return Metric(name, unit, meaning, where, Section.mixture, chart, _MIXTURE, Axis.tokens)


def _norm(name: str, meaning: str, chart: str, needs: str = "") -> Metric:
    where = "parallel/gradient_norms.py"
    return Metric(name, "", meaning, where, Section.optimizer, chart, _NORMS, needs=needs)


def _speed(name: str, unit: str, meaning: str, chart: str, **more: str) -> Metric:
    where = "pretrain/throughput.py"
    return Metric(name, unit, meaning, where, Section.throughput, chart, _LOG, **more)  # type: ignore[arg-type]


def _time(stage: str, meaning: str) -> Metric:
    return Metric(
        f"time/{stage}_seconds",
        "s",
        f"{meaning}; mean over ranks, in the step measured",
        "parallel/stage_clock.py",
        Section.throughput,
        "Where a step goes",
        _TIMES,
    )


def _router(
    name: str, meaning: str, chart: str, *, unit: str = "", logged: str = _ROUTER, needs: str = ""
) -> tuple[Metric, Metric]:
    """Of the model, and of each sparse layer."""
    where, section = "pretrain/router_report.py", Section.routing
    needs = f"experts{needs}"
    overall = Metric(f"router/{name}", unit, meaning, where, section, chart, logged, needs=needs)
    layer = Metric(
        f"router/layer_<layer>/{name}",
        unit,
        f"the same of one layer: {meaning}",
        where,
        section,
        f"{chart}, by layer",
        logged,
        needs=needs,
    )
    return overall, layer


def _anomaly(name: str, meaning: str, chart: str) -> Metric:
    where = "pretrain/anomaly_watch.py"
    return Metric(f"anomaly/{name}", "", meaning, where, Section.health, chart, _LOG)


def _straggler(name: str, unit: str, meaning: str, chart: str) -> Metric:
    where = "pretrain/stragglers.py"
    return Metric(f"stragglers/{name}", unit, meaning, where, Section.health, chart, _TIMES)


METRICS: tuple[Metric, ...] = (
    _loss(
        "train/loss",
        "sum over the step's valid tokens / their number",
        Section.loss,
        "Training loss",
        _LOG,
    ),
    _loss(
        "eval/loss",
        "the same over the whole validation set",
        Section.loss,
        "Validation loss",
        _EVAL,
    ),
    _loss(
        "eval/family/<family>/loss",
        "validation loss over the tokens of a family's languages",
        Section.languages,
        "Validation loss by family",
        _EVAL,
    ),
    _predicted(
        "predicted_loss",
        "the scaling law's, of a finished run of so many tokens and these ratios; before the end "
        "of its learning rate schedule a run lies above it",
        PREDICTED,
    ),
    _predicted("predicted_low", "lower end of the law's 90 % interval", PREDICTED),
    _predicted("predicted_high", "upper end of the law's 90 % interval", PREDICTED),
    _predicted(
        "loss_over_prediction",
        "measured / predicted validation loss of a family",
        "Measured / predicted loss by family",
        unit="",
    ),
    _loss(
        "eval/language/<language>/loss",
        "validation loss over a language's tokens",
        Section.languages,
        "Validation loss by language",
        _EVAL,
    ),
    _loss(
        "train/family/<family>/loss",
        "training loss over a family's tokens since the report before",
        Section.languages,
        "Training loss by family",
        _MIXTURE,
    ),
    _loss(
        "train/language/<language>/loss",
        "training loss over a language's tokens since the report before",
        Section.languages,
        "Training loss by language",
        _MIXTURE,
    ),
    _mixture(
        "data/family/<family>/asked_ratio",
        "",
        "share of the samples that the ratios asked for, since the report before",
        "Ratios asked for",
    ),
    _mixture(
        "data/family/<family>/ratio",
        "",
        "share of the valid tokens trained on, counted where the loss is, since the report before",
        "Ratios realised",
    ),
    _mixture(
        "data/family/<family>/tokens",
        "tokens",
        "drawn since the run's first step, padding included",
        "Tokens by family",
    ),
    _mixture(
        "data/language/<language>/tokens",
        "tokens",
        "drawn since the run's first step, padding included",
        "Tokens by language",
    ),
    _mixture(
        "data/family/<family>/epochs",
        "",
        "samples drawn / samples there are, over a family's languages",
        "Epochs by family",
    ),
    _mixture(
        "data/language/<language>/epochs",
        "",
        "passes over a language's sequences",
        "Epochs by language",
    ),
    Metric(
        "train/consumed_tokens",
        "tokens",
        "valid tokens trained on since the run's first step",
        "pretrain/train_state.py",
        Section.mixture,
        "Tokens",
        f"{_LOG}, and at evaluations",
    ),
    Metric(
        "train/consumed_sequences",
        "sequences",
        "sequences trained on since the run's first step",
        "pretrain/train_state.py",
        Section.mixture,
        "Sequences",
        _LOG,
    ),
    Metric(
        "train/learning_rate",
        "",
        "of this step",
        "pretrain/learning_rate.py",
        Section.optimizer,
        "Learning rate",
        _LOG,
    ),
    Metric(
        "train/grad_norm",
        "",
        "2-norm of the gradient of the mean loss, before clipping",
        "parallel/engine.py",
        Section.optimizer,
        "Gradient norm",
        _LOG,
    ),
    _norm(
        "gradients/block/<block>/norm",
        "of one kind of parameters: embedding (with tied weights also the output projection), "
        "attention, feed_forward, experts (shared ones too), router, norms (all layer norms), "
        "output, other; the root of the sum of their squares is train/grad_norm",
        "Gradient norm by kind of parameter",
    ),
    _norm(
        "gradients/layer_<layer>/norm",
        "of one layer's parameters; layers count from 1",
        "Gradient norm by layer",
    ),
    _norm("weights/norm", "2-norm of all trained weights (fp32 masters)", "Weight norm"),
    _norm(
        "weights/block/<block>/norm",
        "2-norm of the trained weights of one kind",
        "Weight norm by kind of parameter",
    ),
    _speed(
        "throughput/tokens_per_second",
        "tokens/s",
        "all ranks together, over the last 20 steps, evaluations and saves left out",
        "Tokens per second",
        best="max",
    ),
    _speed(
        "throughput/step_seconds", "s", "of one step, mean over the last 20", "Seconds per step"
    ),
    _speed(
        "throughput/data_wait_seconds",
        "s",
        "rank 0 waiting for its batches in a step, mean over the last 20",
        "Seconds per step",
    ),
    _speed(
        "throughput/model_flops_utilisation",
        "",
        "FLOP/s the model's mathematics needs / peak of all devices (on a CPU: / best measured "
        "rate of a matrix product)",
        "Model FLOPs utilisation",
        best="max",
    ),
    _speed(
        "throughput/pipeline_bubble",
        "",
        "share of a step in which a pipeline stage idles, computed from the schedule with stages "
        "of equal length, (p - 1) / (v m + p - 1); the measured wait is in time/schedule_seconds",
        "Pipeline bubble",
        needs="a pipeline",
    ),
    _time("data", "waiting for the batch"),
    _time("forward", "forward passes"),
    _time("backward", "backward passes"),
    _time("schedule", "the schedule around them, and messages between pipeline stages"),
    _time("gradients", "summing gradients over ranks"),
    _time("optimizer", "gradient norm, clipping, update, gathering shared-out weights"),
    _time("other", "the rest of the step"),
    Metric(
        "time/communication_seconds",
        "s",
        "of all the stages above: inside torch.distributed, transfer and waiting; mean over ranks",
        "parallel/stage_clock.py",
        Section.throughput,
        "Where a step goes",
        _TIMES,
    ),
    *_router("load_max", "choices of the busiest expert, in even shares", "Busiest expert"),
    *_router("load_min", "choices of the idlest expert, in even shares", "Idlest expert"),
    *_router("dropped_share", "share of the choices that capacity turned away", "Dropped choices"),
    *_router("unused_experts", "experts that got no token", "Unused experts", unit="experts"),
    *_router(
        "entropy",
        "of the router's distribution over experts, mean over tokens",
        "Router entropy",
        unit="nats",
    ),
    *_router(
        "balance_loss",
        "the auxiliary loss before its coefficient; 1 where loads are even",
        "Balance loss",
        needs=" and a router with a balance loss",
    ),
    *_router(
        "collapse",
        "Tr(Σ_W pinv(Σ_B)) of router inputs grouped by expert; small: representations collapse",
        "Representation collapse",
        logged=_EVAL,
    ),
    *_router(
        "fluctuation",
        "share of validation tokens whose first choice changed since the evaluation before",
        "Routing fluctuation",
        logged=f"{_EVAL}, from the second of a start on",
    ),
    _straggler("busy_max_seconds", "s", "the slowest rank's step without communication", "Ranks"),
    _straggler("busy_median_seconds", "s", "the median rank's", "Ranks"),
    _straggler("slowdown", "", "the one over the other", "Slowest rank / median rank"),
    _straggler("slowest_rank", "", "its number; its host is in stragglers.jsonl", "Slowest rank"),
    _anomaly("count", "steps that looked wrong, since the run's first", "Anomalies"),
    _anomaly("skipped_updates", "updates that did not happen, since the run's first", "Anomalies"),
    _anomaly("rollbacks", "returns to an earlier checkpoint", "Anomalies"),
    _anomaly("loss_z", "robust z-score of the loss among its last ones", "Spikes"),
    _anomaly("grad_norm_z", "the same of the gradient norm", "Spikes"),
    Metric(
        "memory/peak_bytes",
        "B",
        "most that rank 0 held at once: torch's allocator on a GPU, resident on a CPU",
        "pretrain/throughput.py",
        Section.health,
        "Memory",
        _LOG,
    ),
    Metric(
        "memory/peak_bytes_max",
        "B",
        "the same of the rank with the most",
        "pretrain/stragglers.py",
        Section.health,
        "Memory",
        _TIMES,
    ),
    Metric(
        "memory/host_bytes",
        "B",
        "resident memory of rank 0's process now",
        "pretrain/throughput.py",
        Section.health,
        "Host memory",
        _LOG,
    ),
    Metric(
        "memory/reserved_bytes",
        "B",
        "most that torch's allocator took from rank 0's GPU",
        "pretrain/throughput.py",
        Section.health,
        "Memory",
        _LOG,
        needs="a GPU",
    ),
    Metric(
        "checkpoint/stall_seconds",
        "s",
        "training stood still for a save",
        "pretrain/instruments.py",
        Section.health,
        "Seconds outside steps",
        _SAVE,
    ),
    Metric(
        "eval/seconds",
        "s",
        "training stood still for an evaluation",
        "pretrain/instruments.py",
        Section.health,
        "Seconds outside steps",
        _EVAL,
    ),
)


def find(name: str) -> Metric | None:
    """The table's entry for a name in metrics.jsonl; the most specific one, None without any."""
    found = [metric for metric, pattern in _patterns() if pattern.match(name)]
    return max(found, key=lambda metric: len(metric.name.split("<")[0]), default=None)


@cache
def _patterns() -> list[tuple[Metric, re.Pattern[str]]]:
    return [(metric, re.compile(metric.pattern)) for metric in METRICS]


def charts(section: Section) -> list[Chart]:
    """What to draw in a section, in the table's order: metrics of one title together."""
    titles = dict.fromkeys(metric.chart for metric in METRICS if metric.section is section)
    drawn = []
    for title in titles:
        members = tuple(m for m in METRICS if (m.section, m.chart) == (section, title))
        drawn.append(Chart(title, section, members[0].axis, members))
    return drawn


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Made by `python -m pretrain.metrics > docs/metrics.md`; edit `pretrain/metrics.py`.",
        "",
        "Every line of `run_dir/metrics.jsonl` has a `step` (optimizer steps taken) and a `time`",
        "(Unix seconds) besides these. `<word>` stands for any text. W&B and TensorBoard show the",
        "same names. [observability.md](observability.md) says where each of them ends up.",
    ]
    for section in Section:
        lines += ["", f"## {section.value}", ""]
        lines += ["| name | unit | meaning | logged | computed in |", "|---|---|---|---|---|"]
        for metric in (m for m in METRICS if m.section is section):
            needs = f"; needs {metric.needs}" if metric.needs else ""
            lines.append(
                f"| `{metric.name}` | {metric.unit} | {metric.meaning} | {metric.logged}{needs} "
                f"| `{metric.computed_in}` |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
