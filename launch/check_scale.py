"""Whether a launch is too large for the little text that ships with the package."""

from launch.findings import Findings, many
from models.parameter_count import parameter_count
from pretrain.config import PretrainConfig

TOPIC = "data"
# what is small enough to be a trial of the program, and not meant to learn a language
MOST_PARAMETERS = 5_000_000  # without the embedding
MOST_PROCESSES = 8
_EMPTY = "data.corpus and data.store_dir are empty"


def check_scale(config: PretrainConfig, processes: int, findings: Findings) -> None:
    """Warns of a large run on the text that ships, and notes a small one."""
    if config.data.corpus or config.data.store_dir:
        return
    much = too_much_for_shipped_text(config, processes)
    findings.warnings(TOPIC, much)
    if not much:
        text = f"{_EMPTY}: the run trains on the little text that ships with the package"
        findings.notes(TOPIC, [text])


def too_much_for_shipped_text(config: PretrainConfig, processes: int) -> list[str]:
    """What to say of a model that is not tiny, or of many processes, without a text of its own."""
    if config.data.corpus or config.data.store_dir:
        return []
    parameters = parameter_count(config.model, vocab_size=1).non_embedding
    if parameters <= MOST_PARAMETERS and processes <= MOST_PROCESSES:
        return []
    return [
        f"{_EMPTY}: {config.model.name}, of {parameters:,} parameters, would train on the text "
        f"of 0.4 MB that ships with the package, with {many(processes, 'process')}; give "
        "data.store_dir=STORES or data.corpus=CORPUS"
    ]
