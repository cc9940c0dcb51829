"""What engine=deepspeed holds of parameters, gradients and optimizer, and when it holds most.

P is the parameters of a rank that are trained, each shared out over D ranks (data-parallel ones x
context-parallel ones; for experts the expert-data-parallel ones), e the bytes of one, B the
elements reduced together, `deepspeed.reduce_bucket_size` or all there are. In bytes, all the time:

    zero_stage           parameters   gradients                 optimizer
    0, fp32              4 P                                     8 P
    1 and 2              e P                                    12 P / D
    1, bf16              2 P          4 P                       12 P / D
    3                    e P / D      4 P / D, the bucket 4 B   12 P / D

and besides

    0                    4 P, gradients from when they are made to the end of the step
    1, fp32              the same, and the bucket 4 B from the first backward pass on
    1, bf16              2 P, gradients that are added to the 4 P above after each backward pass
    1, bf16, offload     4 P and 4 B, as in fp32
    2                    4 P / D of gradients from one micro-batch to the next, and in backward
                         passes the bucket e B
    3, D > 1             e P, parameters that were gathered and will soon be used again: up to 10^9
                         elements of them, and after the last backward pass those that stay whole;
                         in forward passes what is gathered ahead, 5 10^7 elements, once more

To be reduced, what is in a bucket is copied: in its own type, and in fp32 where that is bf16. In
stages 2 and 3 this happens whenever a bucket is full, in 0 and 1 at the end of a step. What a rank
keeps of reduced gradients, 4 P / D, is allocated then.

On the host, with `offload_optimizer`: 12 P / D of masters and moments and 4 P / D of gradients; in
stages 1 and 2 e P / D for the way back, and the largest parameter (on the device too); in stage 2
and fp32 with several micro-batches 4 P / D to add them up in; in stage 3 4 P / D more of gradients,
and with `offload_parameters` e P / D. On a CPU the host's memory is the device's.

Read off DeepSpeed 0.19.8 and measured (benchmarks/memory.py). Left out are its paddings, at most
2 D elements for each group of parameters. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from models.activation_memory import Operation
from models.stage_memory import Moment
from parallel.deepspeed_config import DeepSpeedConfig

# DeepSpeed's defaults, in elements
LARGEST_REDUCTION = 500_000_000  # of gradients that torch has accumulated
MOST_GATHERED = 1_000_000_000  # parameters of stage 3 that are kept for their next use
AHEAD = 50_000_000  # of these gathered together, before they are needed


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Elements of a rank's parameters by their kind, and how many ranks have the same ones."""

    dense: int
    routers: int
    experts: int
    frozen: bool  # routers and experts have neither gradients nor optimizer
    replicas: int
    expert_replicas: int


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Bytes beside activations; see the module's docstring."""

    parameters: int
    gradients: int = 0
    optimizer: int
    host: int = 0
    gathered: int = 0  # parameters, from the first forward pass to the last backward pass
    whole: int = 0  # those of them that always are
    ahead: int = 0  # what they are gathered through, in forward passes
    of_element: int = 0  # of gradients that wait for the end of the step, from when they are made
    between: int = 0  # gradients, from the end of the first micro-batch to that of the step
    bucket: int = 0  # in backward passes
    bucket_waits: bool = False  # in forward passes after the first backward pass too
    bucket_elements: int | None = None  # that make it full; None: reduced at the end only
    copies: int = 0  # of what is reduced
    shares: int = 0  # of reduced gradients, from the first reduction of a backward pass on
    shares_stay: bool = False  # for the micro-batches to come; else they are added up in `between`


def buffers_of(
    settings: DeepSpeedConfig,
    trained: Trained,
    operations: Sequence[Operation],
    *,
    element: int,
    on_cpu: bool,
    micro_batches: int,
) -> Buffers:
    """operations: of a forward pass. element: bytes of a parameter, 2 or 4."""
    job = _Job(settings, trained, operations, element, micro_batches)
    found = (job.zero_0, job.zero_1, job.zero_2, job.zero_3)[settings.zero_stage]()
    if settings.offload_optimizer:
        found = job.offloaded(found)
    if settings.offload_parameters:
        found = replace(found, parameters=0, host=found.host + found.parameters)
    if on_cpu:
        found = replace(found, optimizer=found.optimizer + found.host, host=0)
    return found


@dataclass(frozen=True)
class _Job:
    settings: DeepSpeedConfig
    trained: Trained
    operations: Sequence[Operation]
    element: int
    micro_batches: int

    @property
    def everything(self) -> int:
        return self.trained.dense + self.trained.routers + self.trained.experts

    @property
    def elements(self) -> int:
        """P."""
        return self.trained.dense if self.trained.frozen else self.everything

    @property
    def share(self) -> int:
        """P / D."""
        trained = self.trained
        if trained.frozen or self.settings.zero_stage == 3:
            return self.elements // trained.replicas
        dense = trained.dense + trained.routers
        return dense // trained.replicas + trained.experts // trained.expert_replicas

    @property
    def bucket(self) -> int:
        """B."""
        return min(self.settings.reduce_bucket_size, self.everything)

    @property
    def buckets(self) -> int:
        """One is filled while the other is reduced."""
        return 2 if self.settings.overlap_comm else 1

    @property
    def bf16(self) -> bool:
        return self.element == 2

    def zero_0(self) -> Buffers:
        return Buffers(
            parameters=4 * self.everything,
            optimizer=8 * self.elements,
            of_element=4,
            between=4 * self.elements,
            copies=4 * min(self.elements, LARGEST_REDUCTION),
        )

    def zero_1(self) -> Buffers:
        found = Buffers(
            parameters=self.element * self.everything,
            optimizer=12 * self.share,
            of_element=4,
            between=4 * self.elements,
            bucket=4 * self.bucket * self.buckets,
            bucket_waits=True,
            shares=4 * self.share,
            shares_stay=self.bf16,
        )
        if not self.bf16 or self.settings.offload_optimizer:
            return found
        return replace(
            found,
            gradients=4 * self.elements,
            of_element=2,
            between=2 * self.elements,
            bucket=0,
            # more are reduced where they are
            copies=4 * self.elements if self.elements <= LARGEST_REDUCTION else 0,
            shares=0,
        )

    def zero_2(self) -> Buffers:
        return Buffers(
            parameters=self.element * self.everything,
            optimizer=12 * self.share,
            between=4 * self.share,
            bucket=self.element * self.bucket * self.buckets,
            bucket_elements=self.bucket,
            copies=(6 if self.bf16 else 4) * self.bucket,
            shares=4 * self.share,
            shares_stay=self.bf16,
        )

    def zero_3(self) -> Buffers:
        e, replicas = self.element, self.trained.replicas
        matrices = [size for operation in self.operations for size in operation.matrices]
        vectors = self.everything - sum(matrices)
        most = self.settings.param_persistence_threshold
        whole = vectors + sum(size for size in matrices if size <= most)
        found = Buffers(
            parameters=e * self.everything // replicas,
            gradients=4 * self.share + 4 * self.bucket,
            optimizer=12 * self.share,
            bucket_elements=self.bucket,
            copies=8 * self.bucket,
        )
        if replicas == 1:
            return found
        return replace(
            found,
            gathered=e * min(self.everything, max(whole, MOST_GATHERED)),
            whole=e * whole,
            ahead=e * min(self.everything - whole, AHEAD),
        )

    def offloaded(self, on_device: Buffers) -> Buffers:
        share, e, zero = self.share, self.element, self.settings.zero_stage
        if zero == 3:
            return replace(
                on_device, optimizer=0, gradients=on_device.gradients - 4 * share, host=20 * share
            )
        largest = e * max(size for operation in self.operations for size in operation.matrices)
        found = replace(
            on_device,
            optimizer=0,
            gradients=on_device.gradients + largest,
            host=(16 + e) * share + largest,
        )
        if self.bf16:
            return found
        sums = found.between if zero == 2 and self.micro_batches > 1 else 0
        between = 0 if zero == 2 else found.between
        return replace(found, host=found.host + sums, between=between, shares=0)


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which most is in use."""

    moment: Moment  # of activations
    gradients: int = 0  # beside those that are there all the time
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.moment.total + self.gradients + self.gathered


def peak_of_step(buffers: Buffers, operations: Sequence[Operation], micro_batches: int) -> Peak:
    """More micro-batches than two are like two."""
    found: list[Peak] = []
    kept = waiting = 0

    def look(running: int, gradients: int, gathered: int, name: str) -> None:
        found.append(Peak(Moment(kept, running, name), gradients, gathered))

    for number in range(min(micro_batches, 2)):
        idle = waiting + (buffers.bucket if number and buffers.bucket_waits else 0)
        for operation in operations:
            kept += operation.kept
            # all that was gathered ahead has been used when the loss is at work
            ahead = buffers.ahead if operation is not operations[-1] else 0
            name = f"forward pass of {operation.name}"
            look(operation.forward, idle, buffers.gathered + ahead, name)
        to_share = 0 if number and buffers.shares_stay else buffers.shares
        made = shared = 0
        for operation in reversed(operations):
            held = waiting + shared + buffers.bucket
            look(operation.backward, held, buffers.gathered, f"backward pass of {operation.name}")
            kept -= operation.kept
            made += operation.weights
            if buffers.bucket_elements is not None and made > buffers.bucket_elements:
                made, shared = 0, to_share
                name = f"reduction of gradients after {operation.name}"
                look(buffers.copies, waiting + shared + buffers.bucket, buffers.gathered, name)
            waiting += 0 if number else buffers.of_element * operation.weights
        if buffers.of_element:
            waiting = buffers.between  # those of vectors too
        # shares that do not stay are allocated when the first bucket's copy is gone
        shared = to_share if buffers.shares_stay else shared
        held = waiting + buffers.bucket
        look(max(buffers.copies + shared, to_share), held, buffers.whole, "reduction of gradients")
        waiting = buffers.between
    return max(found, key=lambda peak: peak.total)
