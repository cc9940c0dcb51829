"""How documents become training sequences. Imports neither torch nor numpy."""

from dataclasses import dataclass
from enum import Enum


class PackingMode(Enum):
    """How documents are laid into sequences of seq_length + 1 ids."""

    # all documents one after another, cut every seq_length tokens: no padding, most documents cut
    concatenate = "concatenate"
    # best-fit decreasing (arXiv 2404.10830 section 3): no document is cut unless it is longer than
    # a sequence; what no document fits into is padding
    best_fit = "best_fit"


@dataclass(kw_only=True)
class PackingConfig:
    """The defaults are those of GPT-2 and Megatron-LM: attention and loss cross the borders."""

    mode: PackingMode = PackingMode.concatenate
    max_document_tokens: int | None = None  # drop what a document has beyond this; None: keep all
    reset_attention: bool = False  # no token attends to another document
    reset_positions: bool = False  # positions start at 0 in each document
    # no loss where the label is the first token of the next document
    mask_boundary_loss: bool = False

    def __post_init__(self) -> None:
        longest = self.max_document_tokens
        if longest is not None and longest < 2:
            raise ValueError(
                f"data.packing.max_document_tokens={longest}: must be at least 2, a token and the "
                "one it predicts; leave it null to keep whole documents"
            )
        if self.reset_positions and not self.reset_attention:
            raise ValueError(
                "data.packing.reset_positions=true needs data.packing.reset_attention=true, not "
                "false: distances to the tokens of an earlier document would mean nothing"
            )

    @property
    def needs_plan(self) -> bool:
        """Whether a sequence is found in a table (data.packing_plan) and not by arithmetic."""
        return self.mode is PackingMode.best_fit or self.max_document_tokens is not None

    def fingerprint(self) -> dict[str, str | int | bool | None]:
        """What the stream of samples depends on, as JSON."""
        return {
            "mode": self.mode.value,
            "max_document_tokens": self.max_document_tokens,
            "reset_attention": self.reset_attention,
            "reset_positions": self.reset_positions,
            "mask_boundary_loss": self.mask_boundary_loss,
        }
