"""SLURM's commands, and their own words where they refuse."""

import subprocess

PATIENCE = 60.0  # seconds; a controller that is busy takes some


class SlurmError(Exception):
    """SLURM is not here, or did not do what it was asked."""


def ask_slurm(*command: str) -> str:
    """What a SLURM command prints. Raises SlurmError with its own words where it refuses."""
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} does not answer; is SLURM's controller down?") from None
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from None
    if ended.returncode:
        said = ended.stderr.strip() or f"ended with {ended.returncode}, without a word"
        raise SlurmError(f"{' '.join(command)}: {said}")
    return ended.stdout
