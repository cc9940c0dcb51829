"""Hugging Face's Trainer, its own loop, on GPT2 or Llama (variants: gpt2, llama)."""

import importlib.metadata
import os
import tempfile
import warnings

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.jobs import ADAM_BETAS, CLIP_GRAD, LEARNING_RATE, WEIGHT_DECAY, Job
from benchmarks.peers.measure import StepMeter, make_batch, parse_arguments


def build_model(job: Job, variant: str) -> PreTrainedModel:
    if variant == "gpt2":
        config = GPT2Config(
            vocab_size=job.vocab_size,
            n_positions=job.seq_length,
            n_embd=job.hidden_size,
            n_layer=job.num_layers,
            n_head=job.num_attention_heads,
            n_inner=job.ffn_hidden_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            use_cache=False,
        )
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=job.vocab_size,
        hidden_size=job.hidden_size,
        intermediate_size=job.gated_ffn_hidden_size,
        num_hidden_layers=job.num_layers,
        num_attention_heads=job.num_attention_heads,
        max_position_embeddings=job.seq_length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class OneBatch(torch.utils.data.Dataset):
    """The reference batch over and over; the model shifts the labels itself."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.ids[index % len(self.ids)]
        return {"input_ids": row, "labels": row}


class MeterCallback(TrainerCallback):
    """Starts after the batch was fetched, stops after the optimizer step."""

    def __init__(self, meter: StepMeter) -> None:
        self.meter = meter

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.meter.start()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.meter.stop()


def main() -> None:
    warnings.filterwarnings("ignore")
    arguments = parse_arguments()
    job, steps = arguments.job, arguments.warmup + arguments.steps
    model = build_model(job, arguments.variant)
    ids, _ = make_batch(job)
    meter = StepMeter(arguments.warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train_dataset=OneBatch(ids, job.micro_batch_size * steps),
            callbacks=[MeterCallback(meter)],
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=job.micro_batch_size,
                max_steps=steps,
                use_cpu=True,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                optim="adamw_torch_fused",
                learning_rate=LEARNING_RATE,
                adam_beta1=ADAM_BETAS[0],
                adam_beta2=ADAM_BETAS[1],
                weight_decay=WEIGHT_DECAY,
                max_grad_norm=CLIP_GRAD,
                lr_scheduler_type="constant",
                dataloader_num_workers=0,
            ),
        )
        trainer.train()
    meter.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    meter.print_result(
        parameters=model.num_parameters(), version=importlib.metadata.version("transformers")
    )


if __name__ == "__main__":
    main()
