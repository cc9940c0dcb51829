"""Are the files there that the settings of the data name? Reads none of the text, and needs no
numpy: a login node is asked no more than that."""

from pathlib import Path

from data.config import DataConfig
from data.corpus import corpus_files
from data.family_grouping import load_grouping
from data.tokenizer_file import tokenizer_file
from launch.check_paths import path_of
from launch.findings import ERROR, Findings

TOPIC = "data"


def absent(config: DataConfig) -> list[str]:
    """What a run would miss, if its nodes saw the file system that is seen here."""
    findings = Findings()
    if config.store_dir:
        with path_of("data.store_dir", config.store_dir, findings):
            stores_are_there(config, findings)
    elif config.corpus:
        with path_of("data.corpus", config.corpus, findings):
            find_corpus(Path(config.corpus).expanduser(), findings)
    if config.tokenizer:
        with path_of("data.tokenizer", config.tokenizer, findings):
            try:
                tokenizer_file(Path(config.tokenizer).expanduser())
            except (FileNotFoundError, ValueError) as error:
                findings.errors(TOPIC, [str(error)])
    with path_of("data.families", config.families, findings):
        try:
            load_grouping(config.families)
        except (FileNotFoundError, ValueError) as error:
            findings.errors(TOPIC, [str(error)])
    return [finding.text for finding in findings.of(ERROR)]


def stores_are_there(config: DataConfig, findings: Findings) -> bool:
    """Whether data.store_dir has a folder of token stores to train on. Raises OSError."""
    if (Path(config.store_dir).expanduser() / "train").is_dir():
        return True
    findings.errors(
        TOPIC,
        [
            f"data.store_dir={config.store_dir}: no folder with a train/ folder of token "
            "stores in it; python -m data.tokenize makes one"
        ],
    )
    return False


def find_corpus(corpus: Path, findings: Findings) -> list[Path]:
    """The files of a corpus; none where there are none, or where they are no corpus.

    Raises OSError for a path that cannot be looked at.
    """
    try:
        return corpus_files(corpus)
    except (FileNotFoundError, ValueError) as error:
        findings.errors(TOPIC, [str(error)])
        return []
