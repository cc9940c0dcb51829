"""Whether `engine` trains these settings with the packages and on the devices there are to be.

What an engine refuses anywhere is among the rules of pretrain.config_rules.validate; here is what
it refuses once it finds itself on a GPU, and what it would start with and not use. Imports neither
torch nor DeepSpeed.
"""

from launch.config import ClusterConfig
from launch.findings import Findings
from parallel.accelerators import ApexTrap, check_apex
from parallel.config import Precision
from parallel.deepspeed_config import EngineKind, Launch, problems_on_gpu, without_effect
from pretrain.config import PretrainConfig

TOPIC = "settings"
# names of pretrain.memory.DEVICES: of NVIDIA's generations before Ampere, which added bf16
_WITHOUT_BF16 = ("v100-16gb", "v100-32gb", "t4-16gb")


def refused_on_gpu(config: PretrainConfig) -> list[str]:
    """What the engine refuses once it finds itself on a GPU, and what to change."""
    if config.engine is not EngineKind.deepspeed:
        return []
    return problems_on_gpu(Launch(config.parallel, config.deepspeed, config.model.moe.num_experts))


def check_engine(
    config: PretrainConfig, device: str | None, cluster: ClusterConfig | None, findings: Findings
) -> None:
    """What is refused on a GPU: errors where `device` is said or the nodes of `cluster` have GPUs;
    warnings where nobody has said what the run is to have; nothing for a cluster without GPUs.
    What is refused or ignored anywhere besides."""
    try:
        check_apex()
    except ApexTrap as error:
        findings.errors(TOPIC, [str(error)])
    if config.engine is EngineKind.deepspeed:
        findings.warnings(TOPIC, without_effect(config.parallel, config.deepspeed))
    findings.warnings(TOPIC, _slow_bf16(config.parallel.precision, device))
    problems = refused_on_gpu(config)
    if device is not None or (cluster is not None and cluster.gpus_per_node):
        findings.errors(TOPIC, problems)
    elif cluster is None:
        findings.warnings(TOPIC, [f"refused on a GPU: {problem}" for problem in problems])


def _slow_bf16(precision: Precision, device: str | None) -> list[str]:
    """For a device that computes bf16 without units for it."""
    if device is None or precision is Precision.fp32:
        return []
    if device.strip().lower().replace("_", "-") not in _WITHOUT_BF16:
        return []
    becomes = " is bf16 on a GPU, and that" if precision is Precision.auto else ""
    return [
        f"parallel.precision={precision.value}{becomes} has no units of its own on --device "
        f"{device}, older than NVIDIA's Ampere: it is emulated and slow, where an operation has it "
        "at all; use parallel.precision=fp32"
    ]
