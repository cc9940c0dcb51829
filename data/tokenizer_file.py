"""Whether a tokenizer's file is there. Imports nothing, so that a login node can ask."""

from pathlib import Path

TOKENIZER_KINDS = "a Hugging Face tokenizer.json, a SentencePiece model or a tekken file"


def tokenizer_file(path: Path) -> Path:
    """The path, where a file is there. Raises FileNotFoundError, and ValueError for a folder."""
    if path.is_dir():
        raise ValueError(f"data.tokenizer={path}: a folder; name the file in it, {TOKENIZER_KINDS}")
    if not path.is_file():
        raise FileNotFoundError(
            f"data.tokenizer={path}: no such file; leave data.tokenizer empty for the one that "
            "ships with the package"
        )
    return path
