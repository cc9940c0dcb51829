"""Look at checkpoints, check them, copy them and compare them; one process, whatever the layout.

    python -m launch.checkpoint ls runs/demo/DATE
    python -m launch.checkpoint verify runs/demo/DATE/checkpoints/step_00000050 --full
    python -m launch.checkpoint convert runs/demo/DATE weights --weights-only --dtype bf16
    python -m launch.checkpoint convert runs/demo/DATE tensors --safetensors
    python -m launch.checkpoint diff runs/demo/DATE runs/other

A path may be a run folder, its checkpoints folder or one checkpoint; of several the newest is
taken, or the one of --step. verify also takes a folder that convert --safetensors made. Exit
status of verify: 0 sound, 1 damaged; of diff: 0 equal, 1 different; of all: 2 where there is
nothing to work on.
"""

import argparse
import sys
from pathlib import Path

# before launch/, where `import pretrain` would find pretrain.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted
from pretrain.checkpoint_list import (
    SOUND,
    UNVERIFIED,
    Facts,
    facts_of,
    find_checkpoint,
    find_checkpoints,
    is_safetensors,
    is_unverifiable,
    losses_of,
    others,
    problems_of,
    run_folder_of,
    structural_problems,
)

SHOWN = 20  # lines of differences, unless --all
DTYPE_HELP = "of the weights written; fp16 is for copies, runs do not train in it"


def main() -> None:
    try:
        sys.exit(run(parse(sys.argv[1:])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in {
        "ls": "list checkpoints: step, size, date, tokens, loss; and whether sizes are right",
        "verify": "compare sizes with the manifest, and the index with the files",
        "convert": "write a copy in another form",
        "diff": "compare settings, counters and tensors",
    }.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("path" if name != "diff" else "first", type=Path)
        if name == "diff":
            command.add_argument("second", type=Path)
            command.add_argument("--all", action="store_true", help="show every difference")
        if name == "convert":
            command.add_argument("target", type=Path, help="folder to make")
            command.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help=DTYPE_HELP)
            command.add_argument(
                "--safetensors",
                action="store_true",
                help="weights by name in safetensors files instead of a checkpoint",
            )
            command.add_argument("--max-file-gb", type=float, default=5.0, help="safetensors only")
        if name in ("convert", "diff"):
            command.add_argument(
                "--weights-only", action="store_true", help="leave the optimizer's state out"
            )
        if name == "verify":
            command.add_argument("--full", action="store_true", help="compare checksums, too")
        if name in ("verify", "convert"):
            command.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> int:
    return {"ls": _ls, "verify": _verify, "convert": _convert, "diff": _diff}[options.command](
        options
    )


def _ls(options: argparse.Namespace) -> int:
    folders = find_checkpoints(options.path)
    beside = others(options.path)
    if not folders and not beside:
        find_checkpoint(options.path)  # says what is wrong
    losses = losses_of(run_folder_of(folders[0]) if folders else None)
    facts = [facts_of(folder, losses) for folder in folders]
    for model in [fact.model for fact in facts if fact.model][-1:]:
        words = [f"{model.get('num_layers')} layers of {model.get('hidden_size')}"]
        words += [f"{model['moe.num_experts']} experts"] if "moe.num_experts" in model else []
        words += [str(model[k]) for k in ("layer_norm_placement", "position_embedding_type")]
        print(f"{options.path}: {', '.join(words)}, vocabulary {model.get('vocab_size')}")
    rows = [("step", "size", "saved", "tokens", "loss", ""), *map(_row, facts)]
    rows += [(folder.name, "", "", "", "", what) for folder, what in beside.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        print("  ".join([*cells, row[-1]]).rstrip())
    return 0


def _row(fact: Facts) -> tuple[str, ...]:
    return (
        fact.folder.name if fact.step is None else str(fact.step),
        _bytes(fact.bytes),
        fact.saved.strftime("%Y-%m-%d %H:%M:%S"),
        "" if fact.tokens is None else f"{fact.tokens:,}",
        "" if fact.loss is None else f"{fact.loss[1]:.4f} {fact.loss[0]}",
        fact.state,
    )


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _verify(options: argparse.Namespace) -> int:
    if options.step is None and is_safetensors(options.path):
        folder, structure = options.path, list[str]()  # its manifest is all there is
    else:
        folder = find_checkpoint(options.path, options.step)
        structure = structural_problems(folder)
    problems = problems_of(folder, checksums=options.full)
    how = "checksums" if options.full else "sizes; --full compares checksums, too"
    if is_unverifiable(folder, problems):
        problems, how = [], f"its index fits its files; {UNVERIFIED}"
    problems += [p for p in structure if p not in problems]
    for problem in problems:
        print(f"{folder.name}: {problem}")
    if not problems:
        print(f"{folder.name}: {SOUND} ({how})")
    return 1 if problems else 0


def _convert(options: argparse.Namespace) -> int:
    source = find_checkpoint(options.path, options.step)
    if options.max_file_gb <= 0:
        raise ValueError(f"--max-file-gb={options.max_file_gb} must be above 0")
    from pretrain.convert_checkpoint import DTYPES, to_checkpoint, to_safetensors

    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.safetensors:
        to_safetensors(
            source, options.target, dtype=dtype, max_bytes=int(options.max_file_gb * 1e9)
        )
    else:
        to_checkpoint(source, options.target, dtype=dtype, weights_only=options.weights_only)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{source.name} -> {options.target}, {_bytes(size)}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    first, second = find_checkpoint(options.first), find_checkpoint(options.second)
    from pretrain.compare_checkpoints import compare

    found = compare(first, second, weights_only=options.weights_only)
    limit = None if options.all else SHOWN
    _list("values (first, second)", found.values, limit)
    _list("tensors only in the first", found.only_first, limit)
    _list("tensors only in the second", found.only_second, limit)
    _list("tensors of another shape or type", found.described, limit)
    lines = [
        f"{d.name}: {d.largest:.3e} ({d.relative:.1e} of its largest value), "
        f"{d.elements:,} of {d.numel:,} elements"
        for d in found.tensors
    ]
    _list("largest differences", lines, limit)
    differing = len(found.tensors)
    print(f"{found.compared} tensors compared, {differing} differ" + ("; equal" * found.equal))
    return 0 if found.equal else 1


def _list(title: str, lines: list[str], limit: int | None) -> None:
    if not lines:
        return
    print(f"{title}: {len(lines)}")
    for line in lines[:limit]:
        print(f"  {line}")
    if limit is not None and len(lines) > limit:
        print(f"  and {len(lines) - limit} more; --all shows them")


if __name__ == "__main__":
    say_interrupted()
    main()
