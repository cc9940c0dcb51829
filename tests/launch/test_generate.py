"""Sampling from a checkpoint: what is refused before the ranks have met."""

import sys
from pathlib import Path

import pytest

import launch.generate
from models.config import ModelConfig
from parallel.config import ParallelConfig
from pretrain.checkpoint_list import DamagedCheckpointError
from pretrain.generate import SamplingConfig, generate
from tests.distributed import run_on_gloo
from tests.stored_runs import VOCAB, write_run

MODEL = ModelConfig(
    name="sampled",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    max_position_embeddings=64,
    vocab_size=VOCAB,
)


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_is_found_by_each_rank_before_it_waits_for_another(
    rank: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However long the reading takes: no collective and no door of the start is kept waiting."""
    (checkpoint,) = run_on_gloo(1, write_run, tmp_path / "run", MODEL)
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")  # where nobody answers
    alone = ParallelConfig(tensor_model_parallel_size=2, startup_timeout_seconds=1)
    with pytest.raises(DamagedCheckpointError, match=rf"is damaged: {file.name} "):
        generate(checkpoint, ["a"], alone, SamplingConfig())
    size = ["--tensor-model-parallel-size", "2"]
    monkeypatch.setattr(sys, "argv", ["generate", str(checkpoint), "a", *size])
    with pytest.raises(SystemExit):
        launch.generate.main()
    # each tells it: torchrun ends the others, maybe before they have found it as well
    assert f"is damaged: {file.name} " in capsys.readouterr().err
