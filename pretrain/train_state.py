"""Where a run stands: everything besides weights and optimizer that a resume needs.

The data order and the dropout masks are functions of the step, so counters are all there is.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    step: int = 0  # optimizer steps taken
    consumed_sequences: int = 0
    consumed_tokens: int = 0  # valid tokens

    def advance(self, sequences: int, tokens: int) -> None:
        self.step += 1
        self.consumed_sequences += sequences
        self.consumed_tokens += tokens

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
