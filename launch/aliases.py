"""What Megatron-LM, DeepSpeed, torchtitan and Hugging Face call our settings.

Names are whole, as `zero_optimization.stage`, or the last word of one, as `d_model` of
`model.d_model`; in small letters, with _ for -. Imports nothing of ours.
"""

_MEANT = {
    "model.num_layers": "n_layer n_layers num_hidden_layers depth",
    "model.hidden_size": "d_model hidden_dim n_embd model_dim dim embed_dim hidden",
    "model.ffn_hidden_size": "d_ff ffn_dim intermediate_size ffn_size mlp_hidden_size",
    "model.num_attention_heads": "n_head n_heads num_heads attention_heads",
    "model.num_query_groups": "n_kv_heads num_key_value_heads num_kv_heads",
    "model.moe.num_experts": "num_moe_experts n_experts num_local_experts",
    "model.moe.router_topk": "moe_router_topk top_k num_experts_per_tok",
    "data.seq_length": "seq_len sequence_length max_seq_len max_seq_length context_length",
    "data.tokenizer": "tokenizer_model tokenizer_path",
    "data.corpus": "data_path dataset dataset_path data.path train_data_path",
    "data.prefetch": "num_workers prefetch_factor dataloader_num_workers",
    "parallel.tensor_model_parallel_size": "tp tp_size tensor_parallel_degree "
    "tensor_parallel_size tensor_parallel",
    "parallel.pipeline_model_parallel_size": "pp pp_size pipeline_parallel_degree "
    "pipeline_parallel_size pipeline_parallel",
    "parallel.context_parallel_size": "cp cp_size context_parallel_degree context_parallel",
    "parallel.expert_model_parallel_size": "ep ep_size expert_parallel_degree "
    "expert_parallel_size expert_parallel",
    "parallel.virtual_pipeline_model_parallel_size": "vpp vp virtual_pipeline_parallel_size",
    "deepspeed.offload_optimizer": "cpu_offload optimizer_cpu_offload offload_optimizer_to_cpu",
    "deepspeed.zero_stage": "zero zero_stage zero_optimization.stage zero_optimization",
    "optimizer.lr": "learning_rate max_lr",
    "optimizer.clip_grad": "grad_clip gradient_clipping max_grad_norm gradient_clip_val max_norm "
    "clip_grad_norm",
    "optimizer.adam_beta1": "beta1",
    "optimizer.adam_beta2": "beta2",
    "optimizer.adam_eps": "adam_epsilon optimizer.eps",
    "schedule.lr_warmup_steps": "lr_warmup_iters warmup_steps warmup_iters warmup num_warmup_steps",
    "schedule.lr_decay_steps": "lr_decay_iters decay_steps",
    "schedule.lr_decay_style": "lr_scheduler_type lr_scheduler",
    "train.train_steps": "max_steps train_iters num_steps steps max_iters iterations "
    "num_train_steps",
    "train.micro_batch_size": "train_micro_batch_size_per_gpu per_device_train_batch_size "
    "local_batch_size",
    "train.global_batch_size": "train_batch_size",
    "train.log_interval": "logging_steps log_freq steps_per_print",
    "train.eval_interval": "eval_steps eval_freq",
    "checkpoint.save_interval": "save_steps save_every checkpoint_interval",
    "checkpoint.keep_last": "save_total_limit keep_latest_k",
    "checkpoint.load": "load_dir pretrained_checkpoint init_from",
    "run_dir": "output_dir save save_dir out_dir dump_folder checkpoint_dir",
    "wandb.project": "wandb_project",
}
ALIASES = {name: setting for setting, names in _MEANT.items() for name in names.split()}

# what a value of this name (NAME=VALUE), or any, is here instead
_KINDS = "auto, fp32, bf16"
_PRECISION = f"it is parallel.precision, one of {_KINDS}; fp16 and fp8 are not supported"
_RECOMPUTE = "write parallel.recompute_granularity=full for whole layers, selective for the core "
_RECOMPUTE += "attention, none for neither"
_SELECTIVE, _OFF = (
    f"write parallel.recompute_granularity={word}" for word in ("selective", "none")
)
_COMPILE = "write parallel.compile_elementwise=always for activations and norms, never for none"
_ACCUMULATED = "it follows from other settings: train.global_batch_size / (train.micro_batch_size "
_ACCUMULATED += "x data-parallel size)"
_REPLICAS = "it follows from other settings: processes / (tensor x context x pipeline)"
_ONLINE, _DISABLED = "write wandb.mode=online", "write wandb.mode=disabled"
_DEEPSPEED, _OPTIMIZER_ON_HOST = "write engine=deepspeed", "write deepspeed.offload_optimizer=true"
_PROCESSES = "torchrun's --nproc-per-node says how many processes there are, and --processes where "
_PROCESSES += "settings are only checked"
_SHARE_OF_STEPS = "it is schedule.lr_warmup_steps, which counts steps; write there that share of "
_SHARE_OF_STEPS += "train.train_steps"
_UNTIED = "write model.share_embeddings_and_output_weights=false"
ALL_THERE_ARE = "magnetron-pretrain --cfg job prints all there are"
TOKENS = "a run's length is in steps: train.train_steps = tokens / (train.global_batch_size x "
TOKENS += "data.seq_length)"
ADVICE = {
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate_grad_batches"), _ACCUMULATED),
    **dict.fromkeys(("dp", "dp_size", "data_parallel_size", "data_parallel_degree"), _REPLICAS),
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), _RECOMPUTE),
    **dict.fromkeys(("activation_checkpoint", "recompute"), _RECOMPUTE),
    **dict.fromkeys(("compile", "torch_compile", "compile.enable", "jit_fuser"), _COMPILE),
    "recompute_activations": _SELECTIVE,
    "recompute_activations=false": _OFF,
    **dict.fromkeys(("wandb.enabled", "wandb.enable", "enable_wandb", "use_wandb"), _ONLINE),
    **dict.fromkeys(("wandb.enabled=false", "wandb.enable=false", "use_wandb=false"), _DISABLED),
    **dict.fromkeys(
        ("optimizer.type", "optimizer.name", "optim"), "it is AdamW always; leave it out"
    ),
    **dict.fromkeys(
        ("wandb.name", "wandb_exp_name", "run_name", "experiment_name"),
        "it is the last folder of run_dir, as in run_dir=runs/NAME",
    ),
    "betas": "they are optimizer.adam_beta1 and optimizer.adam_beta2",
    **dict.fromkeys(("precision", "dtype", "torch_dtype", "mixed_precision"), _PRECISION),
    **dict.fromkeys(("precision=bf16", "dtype=bfloat16"), "write parallel.precision=bf16"),
    **dict.fromkeys(("bf16", "bf16.enabled"), "write parallel.precision=bf16"),
    **dict.fromkeys(("bf16=false", "bf16.enabled=false"), "write parallel.precision=fp32"),
    **dict.fromkeys(("fp16=false", "fp16.enabled=false"), "leave it out; there is no fp16"),
    **dict.fromkeys(
        ("fp16", "fp16.enabled"), "fp16 is not supported; write parallel.precision=bf16"
    ),
    **dict.fromkeys(("use_deepspeed", "deepspeed", "deepspeed=true"), _DEEPSPEED),
    **dict.fromkeys(
        ("use_deepspeed=false", "deepspeed=false"), "write engine=megatron, which is the default"
    ),
    **dict.fromkeys(
        (
            "zero_optimization.offload_optimizer.device",
            "offload_optimizer.device",
        ),
        _OPTIMIZER_ON_HOST,
    ),
    "zero_optimization.offload_param.device": "write deepspeed.offload_parameters=true",
    **dict.fromkeys(
        ("gpus", "num_gpus", "n_gpus", "nproc_per_node", "world_size", "devices", "processes"),
        _PROCESSES,
    ),
    "nodes": "torchrun's --nnodes says how many, and this word is for SLURM jobs",
    "chain": "this word is for SLURM jobs",
    "swiglu": "write model.activation=swiglu",
    "disable_bias_linear": "write model.add_bias_linear=false",
    "untie_embeddings_and_output_weights": _UNTIED,
    **dict.fromkeys(("tie_word_embeddings=false", "tie_embeddings=false"), _UNTIED),
    **dict.fromkeys(("lr_warmup_fraction", "warmup_ratio", "warmup_fraction"), _SHARE_OF_STEPS),
    "fp8": "fp8 is not supported; write parallel.precision=bf16",
    **dict.fromkeys(("train_tokens", "max_tokens", "num_tokens", "total_tokens"), TOKENS),
}

# values of other frameworks that no value here looks like, though one may be spelled like it
REFUSED_VALUES = {
    "wandb.mode": {
        **dict.fromkeys(("off", "false", "no", "none"), "did you mean disabled?"),
        **dict.fromkeys(("on", "true", "yes"), "did you mean online?"),
    },
    "parallel.precision": {
        **{name: f"{name} is not supported, use bf16" for name in ("fp8", "fp16", "half")},
        **dict.fromkeys(("bfloat16", "bf16-mixed", "mixed"), "did you mean bf16?"),
        **dict.fromkeys(("float32", "float", "32"), "did you mean fp32?"),
    },
}
