"""The one door to megatron-core: the CPU bridge first, then the names this project uses.

Import megatron-core names from here and nowhere else, so that the bridge is always in place
before megatron-core is imported, and so that what we depend on can be read in one list.
"""

import os
import warnings

from parallel import cpu_bridge

# one hardware queue, so that a tensor-parallel collective enqueued before a matmul starts before
# it; must be in the environment before CUDA starts
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

cpu_bridge.install()
with cpu_bridge.fast_import(), warnings.catch_warnings():
    # megatron-core warns once per module that Transformer Engine and apex are missing;
    # parallel.accelerators reports them, once, with what each would bring
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.core import CheckpointingConfig
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
        save_state_dict_async_plan,
    )
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        mcore_to_pyt_state_dict,
    )
    from megatron.core.dist_checkpointing.strategies.torch import (
        _replace_state_dict_keys_with_sharded_keys as state_by_sharded_keys,
    )
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.distributed.finalize_model_grads import (
        _update_router_expert_bias as update_router_expert_bias,
    )
    from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
    from megatron.core.enums import ModelType
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.num_microbatches_calculator import (
        destroy_num_microbatches_calculator,
        init_num_microbatches_calculator,
    )
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
    from megatron.core.optimizer_param_scheduler import ParamGroupOverride
    from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        gather_from_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import Float16Module, MegatronModule
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.moe.moe_utils import (
        MoEAuxLossAutoScaler,
        topk_routing_with_score_function,
    )
    from megatron.core.transformer.moe.token_dispatcher import (
        MoEAllGatherTokenDispatcher,
        MoEAlltoAllTokenDispatcher,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        BaseTransformerLayer,
        get_transformer_layer_offset,
    )
    from megatron.core.transformer.utils import (
        make_sharded_tensors_for_checkpoint,
        sharded_state_dict_default,
    )
    from megatron.core.utils import get_model_config, make_tp_sharded_tensor_for_checkpoint

cpu_bridge.repair_megatron()

# what megatron-core 0.16 does on every run and a user can do nothing about
for _message in (
    "Apex is not installed. Falling back to Torch Norm",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "`load_state_dict` is deprecated and will be removed",
    "Please use DTensor instead",
    r"`torch.distributed.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)

__all__ = [
    "MLP",
    "AttnMaskType",
    "BaseTransformerLayer",
    "CheckpointingConfig",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "Float16Module",
    "Float16OptimizerWithFloat16Params",
    "LanguageModelEmbedding",
    "LanguageModule",
    "MCoreSavePlanner",
    "MLPSubmodules",
    "MegatronModule",
    "MegatronOptimizerConfig",
    "MoEAllGatherTokenDispatcher",
    "MoEAlltoAllTokenDispatcher",
    "MoEAuxLossAutoScaler",
    "MoESubmodules",
    "ModelType",
    "ModuleSpec",
    "ParamGroupOverride",
    "ParamKey",
    "ParamPredicate",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "TransformerBlock",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "VocabParallelEmbedding",
    "build_module",
    "clip_grad_by_total_norm_fp32",
    "copy_to_tensor_model_parallel_region",
    "destroy_num_microbatches_calculator",
    "dist_checkpointing",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "get_forward_backward_func",
    "get_megatron_optimizer",
    "get_model_config",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "init_num_microbatches_calculator",
    "make_sharded_tensors_for_checkpoint",
    "make_tp_sharded_tensor_for_checkpoint",
    "mcore_to_pyt_state_dict",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "reset_model_temporary_tensors",
    "save_preprocess",
    "save_state_dict_async_plan",
    "scatter_to_sequence_parallel_region",
    "schedules",
    "set_tensor_model_parallel_attributes",
    "sharded_state_dict_default",
    "state_by_sharded_keys",
    "tensor_parallel",
    "topk_routing_with_score_function",
    "update_router_expert_bias",
]
