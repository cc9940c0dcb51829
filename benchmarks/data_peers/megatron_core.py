"""megatron-core's IndexedDataset, GPTDataset and BlendedDataset, with its C++ index builders."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from benchmarks.data_job import BATCH_SIZE, EOD_ID, LANGUAGES, RATIOS, SEED, SEQ_LENGTH, raw
from benchmarks.data_peers.measure import Loader, run


class MegatronLoader(Loader):
    package = "megatron-core"

    def __init__(self, raw: Path, work: Path, variant: str):
        super().__init__(raw, work, variant)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(listener.getsockname()[1])
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": "0", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group("gloo")  # its builder asks for the default group

    def prepare(self) -> None:
        for language, name in enumerate(LANGUAGES):
            ids, lengths = raw(self.raw, language)
            prefix = str(self.work / name)
            builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
            for document in np.split(ids, np.cumsum(lengths)[:-1]):
                builder.add_document(torch.from_numpy(document.astype(np.int32)), [len(document)])
            builder.finalize(prefix + ".idx")

    def open(self, planned: int) -> None:
        tokenizer = SimpleNamespace(
            vocab_size=EOD_ID + 1, eod=EOD_ID, pad=EOD_ID, unique_identifiers={"class": "none"}
        )
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=SEQ_LENGTH,
            blend=([str(self.work / name) for name in LANGUAGES], RATIOS.tolist()),
            split="1,0,0",
            path_to_cache=str(self.index_folder),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=tokenizer,
            mid_level_dataset_surplus=0.005,
        )
        sizes = [planned, 0, 0]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config)
        self._dataset = builder.build()[0]
        self._next, self.numbers = 0, len(self._dataset)

    def sample(self) -> Any:
        self._next += 1
        return self.sample_at((self._next - 1) % self.numbers)

    def sample_at(self, number: int) -> Any:
        return self._dataset[number]["tokens"]

    def batch(self) -> Any:
        first, self._next = self._next, self._next + BATCH_SIZE
        rows = [self._dataset[n % self.numbers] for n in range(first, self._next)]
        return torch.utils.data.default_collate(rows)

    def state(self) -> int:
        return self._next

    def resume(self, state: int) -> None:
        self._next = state


if __name__ == "__main__":
    run(MegatronLoader)
