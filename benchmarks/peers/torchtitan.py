"""torchtitan's own Trainer on its Llama 3.

torchtitan does not support CPUs: its device falls back to CUDA, and language models are offered
flex or varlen attention only, neither of which trains on a CPU. This script stands in for the
device module, gives the model torchtitan's own scaled_dot_product_attention class back, and feeds
the reference batch; tokenizer and data set, which its wheel leaves out, are a few words. Trainer,
model, optimizer and clipping are torchtitan's.
"""

import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.jobs import ADAM_BETAS, CLIP_GRAD, LEARNING_RATE, WEIGHT_DECAY, Job
from benchmarks.peers.measure import StepMeter, make_batch, parse_arguments


def stand_in_for_cuda() -> None:
    """torch.cpu with the functions that torchtitan calls on its device module."""
    functions = {
        "get_device_name": lambda *_: "cpu",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=1 << 34, name="cpu"),
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda *_: {},
        "manual_seed": torch.manual_seed,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "mem_get_info": lambda *_: (1, 1),
    }
    for name, function in functions.items():
        setattr(torch.cpu, name, function)
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: torch.cpu


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build_trainer(job: Job, steps: int, folder: Path):
    """torchtitan's Trainer for its Llama 3 at the job's sizes."""
    import datasets
    import torchtitan.hf_datasets.text_datasets as text_datasets
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.models import llama3
    from torchtitan.models.common import attention
    from torchtitan.models.llama3 import config_registry

    def model_config(attn_backend: str, tp_gemm_backend: str = "default"):
        d = job.hidden_size
        rope = llama3.ComplexRoPE.Config(
            dim=d // job.num_attention_heads,
            max_seq_len=job.seq_length,
            theta=500000,
            scaling="llama",
        )
        return llama3.Llama3Model.Config(
            dim=d,
            vocab_size=job.vocab_size,
            tok_embeddings=llama3.Embedding.Config(
                num_embeddings=job.vocab_size,
                embedding_dim=d,
                param_init=llama3._EMBEDDING_INIT,
            ),
            norm=llama3.RMSNorm.Config(normalized_shape=d, param_init=llama3._NORM_INIT),
            lm_head=llama3.Linear.Config(
                in_features=d,
                out_features=job.vocab_size,
                param_init=llama3._output_linear_init(d),
            ),
            layers=llama3._build_llama3_layers(
                fuse_qkv=True,
                n_layers=job.num_layers,
                dim=d,
                n_heads=job.num_attention_heads,
                hidden_dim=job.gated_ffn_hidden_size,
                rope=rope,
                attn_backend=attn_backend,
            ),
        )

    llama3.llama3_configs["debugmodel"] = model_config
    llama3.get_attention_config = lambda name: attention.ScaledDotProductAttention.Config()
    config_registry.model_registry = lambda flavor, **_: llama3.model_registry(
        flavor, attn_backend="flex"
    )
    text_datasets.DATASETS["c4_test"].loader = lambda path: datasets.Dataset.from_list(
        [{"text": "a b c"}] * 64
    )

    config = config_registry.llama3_debugmodel()
    config.hf_assets_path = config.dump_folder = str(folder)
    config.training.local_batch_size = job.micro_batch_size
    config.training.seq_len = job.seq_length
    config.training.steps = steps
    config.training.dtype = config.training.mixed_precision_param = "float32"
    config.training.max_norm = CLIP_GRAD
    if hasattr(config.training, "disable_cuda_graphs"):
        config.training.disable_cuda_graphs = True
    config.checkpoint.enable = config.validator.enable = False
    config.metrics.log_freq = 1
    config.activation_checkpoint = None
    config.optimizer = default_adamw(lr=LEARNING_RATE, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY)
    config.lr_scheduler.warmup_steps = 0
    config.lr_scheduler.decay_ratio = 0.0
    return config.build()


def main() -> None:
    warnings.filterwarnings("ignore")
    arguments = parse_arguments()
    job, steps = arguments.job, arguments.warmup + arguments.steps
    stand_in_for_cuda()
    ids, labels = make_batch(job)
    positions = torch.arange(job.seq_length)[None].expand(ids.shape).contiguous()

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            yield {"input": ids.clone(), "positions": positions}, labels.clone()

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        trainer = build_trainer(job, steps, Path(folder))
        meter = StepMeter(arguments.warmup)
        data = batches()
        log = trainer.metrics_processor.log

        def keep_loss(step: int, loss: float, *others: float, **extra: dict) -> None:
            meter.losses.append(loss)
            log(step, loss, *others, **extra)

        trainer.metrics_processor.log = keep_loss
        for step in range(1, steps + 1):
            trainer.step = step
            trainer.metrics_processor.data_loading_times.append(0.0)
            meter.start()
            trainer.train_step(data)
            meter.stop()
    meter.print_result(
        parameters=sum(p.numel() for part in trainer.model_parts for p in part.parameters()),
        version=importlib.metadata.version("torchtitan"),
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
