"""How routers fare over a run: sums over all ranks, the metrics' names, and the table of experts.

docs/moe.md says what each number means. `models.router_health` counts on the device of each rank;
here the ranks are added up, at logging steps and after evaluations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import ValidationSet
from data.open_data import Data
from models.config import ModelConfig
from models.router_health import CollapseMeasure, Probe, RouterHealth, RouterTotals, class_sums
from parallel.config import ParallelConfig
from parallel.engine import Engine
from parallel.runtime import Runtime
from pretrain.config import PretrainConfig, TrainConfig
from pretrain.metrics_file import StepLines
from pretrain.tracker import Tracker

ROUTER_FILE = "router.jsonl"
# The probe keeps router inputs in memory: of so many tokens, shared by all ranks, for each layer.
PROBE_TOKENS = 8192


class RouterReport:
    """Collects what `healths` counted. All ranks must call its methods, in the same order.

    The expert x family table goes to `run_dir`/router.jsonl, one JSON object a line:

        {"step": 200, "first_step": 101, "layers": [2, 4], "families": ["indic", "slavic"],
         "load": [layer][family][expert], "dropped": [layer][expert]}

    where numbers count choices over the steps from first_step to step. After a resume, lines of
    later steps are dropped, as in metrics.jsonl.

    Args:
        healths: of this rank's model chunks.
        languages: of the training data; a batch's language ids are places in it.
        family_of: language -> family.
        seq_length: of the validation sequences, in tokens.
        resumed_step: step of the checkpoint the run goes on from; None: from its start.
    """

    def __init__(
        self,
        healths: Sequence[RouterHealth],
        runtime: Runtime,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        languages: Sequence[str],
        family_of: Mapping[str, str],
        seq_length: int,
        run_dir: Path,
        resumed_step: int | None = None,
    ) -> None:
        self.healths = healths
        self.runtime = runtime
        self.layers = [layer + 1 for layer in model.moe.sparse_layers(model.num_layers)]
        self._interval, self._micro_batch_size = (
            train.router_health_interval,
            train.micro_batch_size,
        )
        self._seq_length, self._hidden_size = seq_length, model.hidden_size
        self._languages, self._num_experts = len(languages), model.moe.num_experts
        self._families = sorted({family_of[language] for language in languages})
        self._family_ids = torch.tensor([self._families.index(family_of[c]) for c in languages])
        self._last_choices: dict[int, Tensor] = {}
        self._since_table = self._empty_totals()
        self._counted_up_to = self._table_up_to = resumed_step or 0
        self._file = StepLines(run_dir / ROUTER_FILE, resumed_step) if runtime.rank == 0 else None
        for health in healths:
            health.start(
                num_experts=self._num_experts,
                layers=self.layers,
                languages=self._languages,
                device=runtime.device,
                tensor_parallel_rank=runtime.tensor_parallel_rank,
                sequence_parallel=parallel.sequence_parallel,
            )

    def due(self, step: int) -> bool:
        return step % self._interval == 0

    def training_metrics(self, step: int) -> dict[str, float]:
        """What was counted since the last call, up to this step; starts counting anew."""
        totals = [health.totals for health in self.healths if health.totals is not None]
        packed = torch.stack([part.packed() for part in totals]).sum(0)
        dist.all_reduce(packed)
        for part in totals:
            part.zero()
        collected = self._empty_totals().unpack(packed.cpu())
        self._since_table.load += collected.load
        self._since_table.kept += collected.kept
        self._counted_up_to = step
        return routing_metrics(collected, self.layers)

    @contextlib.contextmanager
    def probing(self, validation: ValidationSet) -> Iterator[None]:
        """Around an evaluation on `validation`; `evaluation_metrics` says what was seen."""
        self._probe = Probe(self._probe_sequences(validation))
        for health in self.healths:
            health.probe = self._probe
        try:
            yield
        finally:
            for health in self.healths:
                health.probe = None

    def evaluation_metrics(self) -> dict[str, float]:
        """Collapse, and fluctuation against the evaluation before, if there was one."""
        device = self.runtime.device
        # of each layer: scatter, tokens whose first choice changed, tokens compared
        sums = torch.zeros(len(self.layers), 3, dtype=torch.float64, device=device)
        measures = []
        for row, layer in enumerate(self.layers):
            hidden, experts = self._probed(layer)
            totals = class_sums(hidden, experts, self._num_experts)
            dist.all_reduce(totals)
            measures.append(CollapseMeasure(totals))
            sums[row, 0] = measures[-1].scatter(hidden, experts)
            before = self._last_choices.get(layer)
            if before is not None:
                sums[row, 1] = (experts != before).sum()
                sums[row, 2] = len(experts)
            self._last_choices[layer] = experts
        del self._probe  # and with it the hidden states
        dist.all_reduce(sums)
        collapse = torch.stack([m.value(s) for m, s in zip(measures, sums[:, 0], strict=True)])
        metrics = _by_layer("collapse", collapse, self.layers)
        metrics["router/collapse"] = float(collapse.mean())
        if sums[:, 2].min() > 0:
            changed = sums[:, 1] / sums[:, 2]
            metrics |= _by_layer("fluctuation", changed, self.layers)
            metrics["router/fluctuation"] = float(changed.mean())
        return metrics

    def write_table(self, tracker: Tracker) -> None:
        """The experts' loads by family since the last table, to router.jsonl and the tracker."""
        if self._file is None or self._counted_up_to == self._table_up_to:
            return
        totals, families = self._since_table, self._families
        load = torch.zeros(len(self.layers), len(families), self._num_experts, dtype=torch.int64)
        load.index_add_(1, self._family_ids, totals.load)
        self._file.write(
            {
                "step": self._counted_up_to,
                "first_step": self._table_up_to + 1,
                "layers": list(self.layers),
                "families": families,
                "load": load.tolist(),
                "dropped": (totals.load.sum(1) - totals.kept).tolist(),
            }
        )
        tracker.log_table(
            self._counted_up_to,
            "router/load_by_family",
            ["layer", "family", *(f"expert_{expert:02d}" for expert in range(self._num_experts))],
            [
                [layer, family, *load[i, j].tolist()]
                for i, layer in enumerate(self.layers)
                for j, family in enumerate(families)
            ],
        )
        self._table_up_to = self._counted_up_to
        totals.zero()

    def go_back(self, step: int) -> None:
        """The run goes on from `step`, an earlier one: what was counted after it does not count."""
        for health in self.healths:
            if health.totals is not None:
                health.totals.zero()
        self._since_table.zero()
        self._counted_up_to = self._table_up_to = step
        if self._file is not None:
            self._file.go_back(step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _empty_totals(self) -> RouterTotals:
        shape = (len(self.layers), self._languages, self._num_experts)
        return RouterTotals(*shape, torch.device("cpu"))

    def _probe_sequences(self, validation: ValidationSet) -> list[list[int]]:
        """Evenly spaced sequences of the validation set, which is sorted by language.

        They depend on the set alone, not on how it is dealt out to ranks and micro-batches.
        """
        count = len(validation)
        wanted = max(1, min(count, PROBE_TOKENS // self._seq_length))
        rank, ranks = self.runtime.data_parallel_rank, self.runtime.data_parallel_size
        found = []
        for number in range(validation.num_micro_batches):
            first = (number * ranks + rank) * self._micro_batch_size
            places = range(min(self._micro_batch_size, count - first))  # padding comes after
            found.append([i for i in places if (first + i) * wanted % count < wanted])
        return found

    def _probed(self, layer: int) -> tuple[Tensor, Tensor]:
        """Router inputs [k, h] and first choices [k] of this rank's tokens of the probe."""
        if layer not in self._probe.hidden:
            device = self.runtime.device
            empty = torch.zeros(0, self._hidden_size, device=device)
            return empty, torch.zeros(0, dtype=torch.int64, device=device)
        return torch.cat(self._probe.hidden.pop(layer)), torch.cat(self._probe.experts[layer])


def open_router_report(
    config: PretrainConfig,
    engine: Engine,
    data: Data,
    runtime: Runtime,
    resumed_step: int | None,
) -> RouterReport | None:
    """The report of a run; None for a dense model and where the settings ask for none."""
    if config.model.moe.num_experts == 0 or config.train.router_health_interval == 0:
        return None
    return RouterReport(
        [chunk.module.router_health for chunk in engine.chunks],
        runtime,
        model=config.model,
        parallel=config.parallel,
        train=config.train,
        languages=data.languages,
        family_of=data.family_of,
        seq_length=config.seq_length,
        run_dir=Path(config.run_dir),
        resumed_step=resumed_step,
    )


def routing_metrics(totals: RouterTotals, layers: Sequence[int]) -> dict[str, float]:
    """Names and values of what training counted; {} if no token was routed.

    Loads are in multiples of the even share, entropies and balance losses means over tokens.
    """
    load = totals.load.sum(1)  # [n, E]
    if not load.sum():
        return {}
    tokens = totals.sums[:, 0]
    relative = load / load.sum(1, keepdim=True) * load.shape[1]
    dropped = (load - totals.kept).sum(1) / load.sum(1)
    unused = (load == 0).sum(1)
    entropy = totals.sums[:, 1] / tokens
    metrics = {
        "router/load_max": float(relative.max()),
        "router/load_min": float(relative.min()),
        "router/dropped_share": float((load.sum() - totals.kept.sum()) / load.sum()),
        "router/unused_experts": float(unused.sum()),
        "router/entropy": float(entropy.mean()),
    }
    per_layer = {
        "load_max": relative.max(1).values,
        "load_min": relative.min(1).values,
        "dropped_share": dropped,
        "unused_experts": unused,
        "entropy": entropy,
    }
    if totals.sums[:, 2].any():  # routers that balance by a bias have no such loss
        balance_loss = totals.sums[:, 2] / tokens
        metrics["router/balance_loss"] = float(balance_loss.mean())
        per_layer["balance_loss"] = balance_loss
    for name, values in per_layer.items():
        metrics |= _by_layer(name, values, layers)
    return metrics


def _by_layer(name: str, values: Tensor, layers: Sequence[int]) -> dict[str, float]:
    """Two digits, so that names sort as layers do (in models of up to 99)."""
    return {
        f"router/layer_{layer:02d}/{name}": value
        for layer, value in zip(layers, values.tolist(), strict=True)
    }
