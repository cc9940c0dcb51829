"""Which runs lie in a folder that is none itself. Imports neither torch nor megatron-core."""

from pathlib import Path

SHOWN = 4  # runs named in an error


def runs_below(folder: Path | str) -> str:
    """What an error about `folder` says of the runs in it; "" where there are none.

    `make demo` writes runs/demo/DATE, and so one may have named runs/demo, or runs.
    """
    folder = Path(folder)
    for depth in ("*", "*/*"):
        found = sorted({path.parent for path in folder.glob(f"{depth}/config*.yaml")})
        # a copy by launch.checkpoint has its settings in it, too, and a manifest
        runs = [str(run) for run in found if not (run / "manifest.json").exists()]
        if runs:
            earlier = f"{len(runs) - SHOWN} more and " if len(runs) > SHOWN else ""
            return f"; it holds runs: {earlier}{', '.join(runs[-SHOWN:])}; name one of them"
    return ""
