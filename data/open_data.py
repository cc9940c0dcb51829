"""The data room's front door: settings in, loaders out.

prepare(config.data)                    # on one rank, the others wait; builds what is missing
data = open_data(config.data, seq_length)         # on every rank
loader = data.train_loader(...)         # loader.micro_batches(consumed_sequences)
validation = data.validation_set(...)   # validation.micro_batches()
"""

from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.language_mixture import LanguageMixture
from data.loader import MicroBatchLoader, ValidationSet
from data.open_mixture import open_mixture, open_tokenizer, prepare
from data.packed_sequences import PackedSequences, Tail
from data.token_store import TokenStore
from data.tokenizer import Tokenizer

__all__ = ["Data", "open_data", "open_tokenizer", "prepare"]


@dataclass(frozen=True)
class Data:
    """Opened data. `mixture` is the training stream."""

    tokenizer: Tokenizer
    mixture: LanguageMixture
    validation_stores: list[TokenStore]
    folder: Path  # of the token stores

    @property
    def languages(self) -> list[str]:
        """Sorted codes; a batch's language ids are places in this list."""
        return self.mixture.languages

    @property
    def families(self) -> list[str]:
        return self.mixture.families

    @property
    def family_of(self) -> dict[str, str]:
        """Language code -> family."""
        return self.mixture.family_of

    def build_packing_plans(self) -> None:
        """What opening the loaders would compute on every rank (data.packing_plan)."""
        for store in self.validation_stores:
            PackedSequences(
                store,
                self.mixture.seq_length,
                Tail.pad,
                self.mixture.packing,
                self.mixture.plan_folder,
            )  # those for training were computed when the mixture was opened

    def train_loader(
        self,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> MicroBatchLoader:
        return MicroBatchLoader(
            self.mixture,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            packing=self.mixture.packing,
        )

    def validation_set(
        self,
        *,
        sequences_per_language: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_multiple: int = 1,
    ) -> ValidationSet:
        return ValidationSet(
            self.validation_stores,
            self.mixture.seq_length,
            languages=self.languages,
            sequences_per_language=sequences_per_language,
            micro_batch_size=micro_batch_size,
            data_parallel_rank=data_parallel_rank,
            data_parallel_size=data_parallel_size,
            micro_batch_multiple=micro_batch_multiple,
            packing=self.mixture.packing,
            plan_folder=self.mixture.plan_folder,
        )


def open_data(config: DataConfig, seq_length: int) -> Data:
    """`data.open_mixture.open_mixture` with loaders; raises the same."""
    opened = open_mixture(config, seq_length)
    return Data(opened.tokenizer, opened.mixture, opened.validation_stores, opened.folder)
