"""The project's own layers, in one place to import from; each lives in a file of its own."""

from parallel.cross_entropy import vocab_parallel_linear_cross_entropy
from parallel.embedding import enable_embedding_gradient_fusion
from parallel.norm import Norm
from parallel.sub_layernorm import SubLayerNormRowParallelLinear
from parallel.weight_gradient import enable_torch_weight_gradient_fusion

__all__ = [
    "Norm",
    "SubLayerNormRowParallelLinear",
    "enable_embedding_gradient_fusion",
    "enable_torch_weight_gradient_fusion",
    "vocab_parallel_linear_cross_entropy",
]
