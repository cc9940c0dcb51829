"""What DeepSpeed's optimizers hold on this rank, in one form for all of them.

Each keeps fp32 weights in flat tensors, of which a rank has a part under ZeRO, and hands Adam
those. A `Shard` is where a parameter's elements lie in one. Its weight and moments are views of
memory that DeepSpeed trains with: reading them costs nothing, writing them changes the run. The
names with an underscore are DeepSpeed's own, of the version in constraints.txt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.deepspeed_library import library

REFUSED = -1.0  # DeepSpeed's word for a norm that is not finite: it drops the step's gradients


@dataclass(frozen=True)
class Shard:
    """The elements [start, start + size) of a flattened parameter that this rank updates."""

    parameter: Tensor
    start: int
    size: int
    flat: Tensor  # fp32; what Adam updates
    offset: int  # of the elements in `flat`

    def of(self, flat: Tensor) -> Tensor:
        """[size]: the shard's part of a tensor that lies as `flat` does."""
        return flat.detach().view(-1).narrow(0, self.offset, self.size)

    @property
    def weight(self) -> Tensor:
        return self.of(self.flat)


class Unsharded:
    """zero_stage=0: parameters and gradients are torch's, whole on every rank."""

    alone = False  # whether no other data-parallel rank holds what a shard does

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.shards = list(self._shards())

    def _shards(self) -> Iterator[Shard]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield Shard(parameter, 0, parameter.numel(), parameter, 0)

    def gradients(self) -> list[Tensor]:
        """Of each shard, reduced: between the last backward pass of a step and `update`."""
        return [shard.parameter.grad.view(-1) for shard in self.shards]  # type: ignore[union-attr]

    def update(self, norm: float) -> None:
        """Take the step with the gradients as they are. All ranks must call it."""
        self.engine.step()

    def discard(self) -> None:
        """Forget the gradients. All ranks must call it."""
        self.engine.zero_grad()

    def weights_were_read(self, *, masters_too: bool) -> None:
        """The model's weights were replaced; bring the rest in line. All ranks must call it."""

    @contextlib.contextmanager
    def changing(self, parameters: list[Tensor]) -> Iterator[None]:
        """Around a change of fp32 weights that every rank makes alike. All ranks must enter it."""
        yield


class Bf16(Unsharded):
    """zero_stage=1 with bf16 parameters, for which DeepSpeed has an optimizer of its own."""

    alone = True

    def _shards(self) -> Iterator[Shard]:
        for flat, parameters in zip(self._flats(), self._parameters(), strict=True):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # none of it is on this rank
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Shard(parameter, here.start, here.numel, flat, there.start)

    def _flats(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_flat_partition

    def _parameters(self) -> list[list[Any]]:
        return self.optimizer.bf16_groups

    def gradients(self) -> list[Tensor]:
        return [
            self._gradient(shard.parameter).narrow(0, shard.start, shard.size)
            for shard in self.shards
        ]

    @staticmethod
    def _gradient(parameter: Any) -> Tensor:
        index = parameter._index_in_param_group
        return parameter._hp_mapping.get_lp_grad_fragment(index).view(-1)

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def weights_were_read(self, *, masters_too: bool) -> None:
        if not masters_too:
            self._follow(self.shards)

    @contextlib.contextmanager
    def changing(self, parameters: list[Tensor]) -> Iterator[None]:
        yield
        changed = {id(parameter) for parameter in parameters}
        self._follow(shard for shard in self.shards if id(shard.parameter) in changed)

    def _follow(self, shards: Iterable[Shard]) -> None:
        """What Adam updates becomes what the model has."""
        for shard in shards:
            shard.weight.copy_(self._in_model(shard))

    def _in_model(self, shard: Shard) -> Tensor:
        return shard.parameter.detach().view(-1).narrow(0, shard.start, shard.size)


class Sharded(Bf16):
    """zero_stage=1 and 2."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # it would look at every gradient for infinities, besides at the norm that it is told
        self.optimizer.check_grad_overflow = True
        self.optimizer.check_overflow = lambda **unused: None

    def _flats(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def _parameters(self) -> list[list[Any]]:
        return self.optimizer.bit16_groups

    def gradients(self) -> list[Tensor]:
        return [self._gradient(shard.parameter) for shard in self.shards]

    def update(self, norm: float) -> None:
        self.optimizer.scaled_global_norm = lambda **unused: torch.tensor(norm)
        self.engine.step()

    def discard(self) -> None:
        self.update(REFUSED)
        for group in self.optimizer.averaged_gradients:
            # DeepSpeed leaves these where the optimizer is offloaded, and would add to them
            self.optimizer.averaged_gradients[group] = None


class Zero3(Sharded):
    """zero_stage=3: between uses a parameter is this rank's share of it, `parameter.ds_tensor`."""

    def __init__(self, engine: Any) -> None:
        Unsharded.__init__(self, engine)

    def _shards(self) -> Iterator[Shard]:
        optimizer = self.optimizer
        for flat, parameters in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
        ):
            for parameter in parameters:
                _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start, size = self.share(parameter)
                if size:
                    yield Shard(parameter, start, size, flat, offset)

    @staticmethod
    def share(parameter: Any) -> tuple[int, int]:
        """(first element, elements) that this rank has of the flattened parameter, padding not
        counted."""
        share = parameter.partition_numel()
        start = share * parameter.ds_process_group.rank()
        return start, max(0, min(share, parameter.ds_numel - start))

    def gradients(self) -> list[Tensor]:
        if self.optimizer.offload_optimizer:
            return [shard.of(shard.flat.grad) for shard in self.shards]  # type: ignore[arg-type]
        by_parameter = {
            id(parameter): gradient
            for index, parameters in enumerate(self.optimizer.fp16_groups)
            for parameter, gradient in zip(
                parameters, self.optimizer.averaged_gradients[index], strict=True
            )
        }
        return [by_parameter[id(s.parameter)].view(-1).narrow(0, 0, s.size) for s in self.shards]

    def update(self, norm: float) -> None:
        self.optimizer._get_norm_groups = lambda: [torch.tensor(norm)]
        self.engine.step()

    def discard(self) -> None:
        self.update(REFUSED)

    @contextlib.contextmanager
    def changing(self, parameters: list[Tensor]) -> Iterator[None]:
        with (
            super().changing(parameters),
            library().zero.GatheredParameters(parameters, modifier_rank=0),
        ):
            yield

    def _in_model(self, shard: Shard) -> Tensor:
        share: Tensor = shard.parameter.ds_tensor  # type: ignore[attr-defined]
        return share.detach().view(-1).narrow(0, 0, shard.size)

    def weights_were_read(self, *, masters_too: bool) -> None:
        super().weights_were_read(masters_too=masters_too)
        self.optimizer._partition_all_parameters()  # drop what was gathered of the old ones
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)


def shards_of(engine: Any, zero_stage: int) -> Unsharded:
    """The form that belongs to the optimizer which DeepSpeed has made."""
    if zero_stage == 3:
        return Zero3(engine)
    if zero_stage == 0:
        return Unsharded(engine)
    # not by precision alone: it makes no Bf16 one where the optimizer is offloaded
    return Bf16(engine) if hasattr(engine.optimizer, "bf16_groups") else Sharded(engine)
