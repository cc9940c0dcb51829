"""Which rank sits where: the arithmetic of 3D parallelism, without a process group.

Ranks are numbered as megatron-core numbers them by default, order "tp-cp-ep-dp-pp" with ep = 1:
the tensor-parallel coordinate varies fastest and the pipeline stage slowest,

    rank = tp + TP * (cp + CP * (dp + DP * pp))

so that the ranks that talk most sit on one node. Experts are laid out over the same ranks a second
time: the TP x CP x DP ranks of a pipeline stage are, for the experts there,

    rank = etp + ETP * (ep + EP * (edp + EDP * pp))

expert-tensor, expert-model and expert-data coordinates. Imports neither torch nor megatron-core.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from parallel.config import ConfigError, ParallelConfig, below


class Coordinates(NamedTuple):
    """Place of one rank along each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """Place of one rank among those that share the experts."""

    etp: int
    ep: int
    edp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Sizes of the axes; `data_parallel_size` is what the others leave of the world.

    Raises ConfigError where the sizes do not divide `world_size`, the number of processes.
    """

    world_size: int
    tensor_model_parallel_size: int = 1
    context_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        problems = below(
            {
                "world_size": self.world_size,
                "parallel.tensor_model_parallel_size": self.tensor_model_parallel_size,
                "parallel.context_parallel_size": self.context_parallel_size,
                "parallel.pipeline_model_parallel_size": self.pipeline_model_parallel_size,
                "parallel.expert_model_parallel_size": self.expert_model_parallel_size,
                "parallel.expert_tensor_parallel_size": self.expert_tensor_parallel_size,
            },
            1,
        )
        if not problems and self.world_size % self.model_replica_size:
            problems.append(self._wrong_world_size())
        elif not problems and self.ranks_per_stage % self.expert_replica_size:
            problems.append(self._experts_do_not_fit())
        if problems:
            raise ConfigError(*problems)

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> "RankLayout":
        return cls(
            world_size=world_size,
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        )

    @property
    def model_replica_size(self) -> int:
        """Ranks that hold one copy of the model together: TP x CP x PP."""
        return (
            self.tensor_model_parallel_size
            * self.context_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.model_replica_size

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage, TP x CP x DP, which its experts are laid out over."""
        return self.world_size // self.pipeline_model_parallel_size

    @property
    def expert_replica_size(self) -> int:
        """Ranks of a stage that hold one copy of its experts together: ETP x EP."""
        return self.expert_tensor_parallel_size * self.expert_model_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        return self.ranks_per_stage // self.expert_replica_size

    @property
    def expert_sizes(self) -> ExpertCoordinates:
        """Size of each axis of the experts; those of megatron-core's RankGenerator with cp = 1."""
        return ExpertCoordinates(
            etp=self.expert_tensor_parallel_size,
            ep=self.expert_model_parallel_size,
            edp=self.expert_data_parallel_size,
            pp=self.pipeline_model_parallel_size,
        )

    @property
    def sizes(self) -> Coordinates:
        """Size of each axis; those of megatron-core's RankGenerator with ep = 1."""
        return Coordinates(
            tp=self.tensor_model_parallel_size,
            cp=self.context_parallel_size,
            dp=self.data_parallel_size,
            pp=self.pipeline_model_parallel_size,
        )

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` sits. Raises ValueError for a rank outside the world."""
        return Coordinates(*self._places(rank, self.sizes))

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Where `rank` sits among the experts. Raises ValueError for a rank outside the world."""
        return ExpertCoordinates(*self._places(rank, self.expert_sizes))

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at these coordinates: the inverse of `coordinates`."""
        sizes = self.sizes
        return tp + sizes.tp * (cp + sizes.cp * (dp + sizes.dp * pp))

    def groups(self, *axes: str) -> list[list[int]]:
        """Ranks that differ only along `axes`, ascending, as one list for each group.

        `groups("tp")` are the tensor-parallel groups, `groups("dp", "cp")` those over which
        gradients are reduced; `groups("ep")` hand tokens to each other, and `groups("edp")` reduce
        the gradients of experts. Raises ValueError for an axis that does not exist, and for axes of
        the dense layers (tp, cp, dp, pp) mixed with those of the experts (etp, ep, edp, pp).
        """
        places: list[Coordinates | ExpertCoordinates]
        if set(axes) <= set(Coordinates._fields):
            places = [self.coordinates(rank) for rank in range(self.world_size)]
        elif set(axes) <= set(ExpertCoordinates._fields):
            places = [self.expert_coordinates(rank) for rank in range(self.world_size)]
        else:
            raise ValueError(
                f"no group runs along {', '.join(axes)}: choose from tp, cp, dp and pp, or for "
                "experts from etp, ep, edp and pp"
            )
        members: dict[Coordinates | ExpertCoordinates, list[int]] = {}
        for rank, place in enumerate(places):
            shared = place._replace(**dict.fromkeys(axes, 0))
            members.setdefault(shared, []).append(rank)
        return list(members.values())

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The group along `axes` that `rank` belongs to."""
        return next(group for group in self.groups(*axes) if rank in group)

    def _places(self, rank: int, sizes: Coordinates | ExpertCoordinates) -> list[int]:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not among the {self.world_size} ranks of the world")
        places = []
        for size in sizes:  # fastest axis first
            rank, place = divmod(rank, size)
            places.append(place)
        return places

    def _experts_do_not_fit(self) -> str:
        ranks, ep = self.ranks_per_stage, self.expert_model_parallel_size
        etp = self.expert_tensor_parallel_size
        typed = f"parallel.expert_model_parallel_size={ep}"
        if etp > 1:
            typed += f" x parallel.expert_tensor_parallel_size={etp}"
        fits = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        return (
            f"{typed} must divide the {ranks} ranks of a pipeline stage, tensor "
            f"{self.tensor_model_parallel_size} x context {self.context_parallel_size} x data "
            f"{self.data_parallel_size}; "
            + (f"the divisors are {', '.join(fits)}" if ranks > 1 else "only 1 does")
            + f", or start a multiple of {math.lcm(self.model_replica_size, self._unit)} processes"
        )

    @property
    def _unit(self) -> int:
        return self.expert_replica_size * self.pipeline_model_parallel_size

    def _wrong_world_size(self) -> str:
        replica, world = self.model_replica_size, self.world_size
        works = [world // replica * replica, (world // replica + 1) * replica]
        factors = [
            f"parallel.tensor_model_parallel_size={self.tensor_model_parallel_size}",
            f"parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size}",
        ]
        if self.context_parallel_size > 1:
            factors.append(f"parallel.context_parallel_size={self.context_parallel_size}")
        started = "1 process was" if world == 1 else f"{world} processes were"
        return (
            f"{' x '.join(factors)} needs a multiple of {replica} processes, and {started} "
            f"started; start {' or '.join(str(n) for n in works if n)} with torchrun "
            "--nproc-per-node, or choose "
            + ("1 for each" if world == 1 else f"sizes whose product divides {world}")
        )


def describe_ranks(ranks: list[int]) -> str:
    """[1, 2, 3, 7] -> "ranks 1-3, 7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
