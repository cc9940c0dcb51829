"""Words of a command line that contradict each other: Hydra takes the last and says nothing.

Imports neither torch nor megatron-core.
"""

from collections.abc import Sequence

from launch.setting_names import groups, settings

OF_THE_JOB = ("cluster", "nodes", "chain")  # words of launch.slurm


def repeated(words: Sequence[str]) -> list[str]:
    """A line for each setting, or group, that is typed with several values."""
    typed: dict[str, list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name.lstrip("+~") not in groups():  # +model=A model=B adds one and replaces it
            name = name.lstrip("+~")
        # tables are merged: a={b: 1} a={c: 1} has both
        if equals and "{" not in value and _is_known(name):
            typed.setdefault(name, []).append(word)
    return [
        f"{', '.join(several[:-1])} and {several[-1]}: typed "
        f"{'twice' if len(several) == 2 else f'{len(several)} times'}, and the last one, "
        f"{several[-1]}, counts; leave the other{'s' * (len(several) > 2)} out"
        for several in typed.values()
        if len(set(several)) > 1
    ]


def _is_known(name: str) -> bool:
    table = name.rpartition(".")[0]
    return (
        name in settings()
        or table in settings()
        or name in groups()
        or name.partition(".")[0] in OF_THE_JOB
    )
