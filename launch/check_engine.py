"""Whether `engine` trains these settings on the devices the run is to have.

What an engine refuses anywhere is among the rules of pretrain.config.validate; here is what it
refuses once it finds itself on a GPU. Imports neither torch nor DeepSpeed.
"""

from launch.config import ClusterConfig
from launch.findings import Findings
from parallel.deepspeed_config import EngineKind, Launch, problems_on_gpu
from pretrain.config import PretrainConfig

TOPIC = "settings"


def refused_on_gpu(config: PretrainConfig) -> list[str]:
    """What the engine refuses once it finds itself on a GPU, and what to change."""
    if config.engine is not EngineKind.deepspeed:
        return []
    return problems_on_gpu(Launch(config.parallel, config.deepspeed, config.model.moe.num_experts))


def check_engine(
    config: PretrainConfig, device: str | None, cluster: ClusterConfig | None, findings: Findings
) -> None:
    """Errors where `device` is said or the nodes of `cluster` have GPUs; warnings where nobody has
    said what the run is to have; nothing for a cluster without GPUs."""
    problems = refused_on_gpu(config)
    if device is not None or (cluster is not None and cluster.gpus_per_node):
        findings.errors(TOPIC, problems)
    elif cluster is None:
        findings.warnings(TOPIC, [f"refused on a GPU: {problem}" for problem in problems])
