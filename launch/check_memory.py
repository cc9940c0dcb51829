"""Whether the run fits the memory of its devices, as models/memory.py predicts it."""

from launch.check_engine import refused_on_gpu
from launch.check_host_memory import check_host_memory, host_room, on_cpu
from launch.check_machines import Planned
from launch.config import ClusterConfig
from launch.findings import Findings
from launch.leaner_layout import shortened, way_out
from models.memory import MemoryPrediction, StageMemory, readable
from pretrain.config import PretrainConfig
from pretrain.memory import device_memory_bytes, predict_memory_of_run, worst_memory_of_run

TOPIC = "memory"
# Of a device's memory, what CUDA, NCCL and fragmentation leave to a program.
USABLE = 0.92


def check_memory(
    config: PretrainConfig | None,
    planned: Planned,
    vocab_size: int | None,
    device: str | None,
    cluster: ClusterConfig | None,
    findings: Findings,
) -> None:
    """Notes what is predicted; warns where it is more than `device`, or a node of `cluster`, has.

    config: legal on so many processes; None where there is no such. device: a name, or a size as in
    80GiB; None: not said. Where nothing can be predicted for a device, a note says why.
    """
    room, processes = _room(device, findings), planned.processes
    refused = room is not None and config is not None and bool(refused_on_gpu(config))
    if obstacle := _obstacle(None if refused else config, vocab_size):
        because = [f"memory is not predicted, because {obstacle}"]
        findings.notes(TOPIC, because if device is not None else [])
        return
    assert config is not None  # the first of the obstacles
    kind = "cpu" if device is None and on_cpu(cluster) else "cuda"
    asked, config = config, shortened(config, processes)
    predicted = predict_memory_of_run(config, processes, vocab_size=vocab_size, device=kind)
    peak = predicted.peak
    findings.notes(TOPIC, [_peak("process" if kind == "cpu" else "GPU", peak)])
    if len(predicted.stages) > 1:
        findings.notes(TOPIC, [f"at their peaks, by pipeline stage: {by_stage(predicted)}"])
    check_host_memory(asked, planned, vocab_size, cluster, room, findings)
    if room is None:
        return
    if peak.total > room:
        on_host = host_room(asked, planned, vocab_size, cluster)
        findings.warnings(
            TOPIC,
            [
                f"{readable(peak.total)} are predicted for a GPU of pipeline stage {peak.stage}, "
                f"in {peak.moment}, and --device {device} leaves {readable(room)}: "
                + way_out(asked, processes, vocab_size, room, on_host)
            ],
        )
        return
    worst = worst_memory_of_run(config, processes, vocab_size=vocab_size).peak.total
    if worst > room:
        findings.warnings(
            TOPIC,
            [
                f"{readable(peak.total)} are predicted with balanced experts, and "
                f"{readable(worst)} should all tokens go to those of one rank; --device {device} "
                f"leaves {readable(room)}: set model.moe.expert_capacity_factor=1.25"
                + ", or use a smaller train.micro_batch_size"
                * (config.train.micro_batch_size > 1)
            ],
        )


def _room(device: str | None, findings: Findings) -> int | None:
    """Bytes of `device` that a program may use; None where it is not said, or unknown."""
    if device is None:
        return None
    try:
        return int(USABLE * device_memory_bytes(device))
    except ValueError as error:
        findings.errors(TOPIC, [f"--device {device}: {error}"])
        return None


def _obstacle(config: PretrainConfig | None, vocab_size: int | None) -> str | None:
    if config is None:
        return "there are errors in settings or layout; mend those first"
    if vocab_size is None and config.model.vocab_size is None:
        return "the vocabulary is not known: data.tokenizer cannot be read"
    return None


def _peak(who: str, peak: StageMemory) -> str:
    return (
        f"a {who} of pipeline stage {peak.stage} needs {readable(peak.total)} at its peak, in "
        f"{peak.moment}: {readable(peak.parameters)} of parameters, {readable(peak.gradients)} of "
        f"gradients, {readable(peak.optimizer)} of optimizer, {readable(peak.activations)} of "
        f"activations, {readable(peak.temporary + peak.other)} of the rest"
    )


def by_stage(predicted: MemoryPrediction) -> str:
    """Of each stage what a rank takes when it takes most; neighbours that take the same together,
    as in 0: 9.1 GiB, 1 to 6: 8.0 GiB, 7: 8.7 GiB."""
    runs: list[tuple[int, int, str]] = []
    for stage in predicted.stages:
        size = readable(stage.total)
        if runs and runs[-1][2] == size:
            runs[-1] = (runs[-1][0], stage.stage, size)
        else:
            runs.append((stage.stage, stage.stage, size))
    return ", ".join(
        f"{first}: {size}" if first == last else f"{first} to {last}: {size}"
        for first, last, size in runs
    )
