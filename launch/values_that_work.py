"""What the settings' own classes say, with values that only the whole of the settings tells.

A class of the room data/ does not know the steps of the run. Imports neither torch nor
megatron-core.
"""

import re
from collections.abc import Sequence

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

_BUDGET = re.compile(r"data\.mixture\.budget=\S+: weighting=unimax needs")  # not a stage's


def with_values(problems: Sequence[str], cfg: DictConfig) -> list[str]:
    """The problems, one or several lines each, with a budget for UniMax."""
    return ["\n".join(_with_budget(line, cfg) for line in one.split("\n")) for one in problems]


def _with_budget(line: str, cfg: DictConfig) -> str:
    try:
        known = _BUDGET.match(line) and cfg.model.name and cfg.data.mixture.unit.name == "tokens"
        if not known:
            return line
        length = cfg.data.seq_length or cfg.model.max_position_embeddings
        tokens = cfg.train.train_steps * cfg.train.global_batch_size * length
    except (OmegaConfBaseException, TypeError):  # refused themselves
        return line
    return f"{line}; use data.mixture.budget={tokens}" if tokens > 0 else line
