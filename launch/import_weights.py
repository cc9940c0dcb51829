"""Bring weights of TorchScale or Megatron-LM into a run folder of ours.

    python -m launch.import_weights torchscale STATE.pt OUT +model=magneto_125m
    python -m launch.import_weights megatron RUN/iter_0001000 OUT +model=pre_ln_1b \\
        model.position_embedding_type=rope

The words behind OUT are settings, as launch/pretrain.py takes them; the model must be the one that
the weights are of: what they do not show (norm epsilon, rotary base, activation) is not checked,
but for what Megatron-LM's checkpoint says of its settings, and for what it does not have: all but
pre_ln with rope or no positions. A checkpoint of ours needs no import. OUT becomes a run folder
with a checkpoint of step 0, for checkpoint.load=OUT, launch.generate, launch.export. Names and
shapes fit, or nothing is written: exit status 2.

    --rotary-interleaved yes|no   Megatron-LM's setting, if its checkpoint does not have it
"""

import argparse
import sys
from pathlib import Path

# before launch/, where `import pretrain` would find pretrain.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted

if __name__ == "__main__":
    say_interrupted()  # also amid the imports below

from launch.command_line import run_on_one_cpu
from launch.schema import load


def main() -> None:
    options = parse(sys.argv[1:])
    run_on_one_cpu(lambda: _import(options))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.import_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("origin", choices=["torchscale", "megatron"])
    parser.add_argument("path", type=Path, help="state dict, or torch_dist folder")
    parser.add_argument("out", type=Path, help="run folder to make")
    parser.add_argument("settings", nargs="+", help="+model=NAME, model.num_layers=4, ...")
    parser.add_argument("--rotary-interleaved", choices=["yes", "no"])
    return parser.parse_args(words)


def _import(options: argparse.Namespace) -> None:
    config = load(options.settings)
    if not options.path.exists():
        raise FileNotFoundError(f"{options.path}: no such file or folder")
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already; name another folder, or remove it")
    # imports torch and megatron-core, which takes seconds
    from models.foreign_weights import Origin
    from pretrain.import_weights import import_weights

    interleaved = options.rotary_interleaved
    report = import_weights(
        Origin(options.origin),
        options.path,
        config,
        options.out,
        rotary_interleaved=None if interleaved is None else interleaved == "yes",
    )
    used = sum(len(names) for names in report["weights"].values())
    print(
        f"{options.path} -> {options.out}: {used} weights made {len(report['weights'])} of ours, "
        f"{report['parameters']:,} parameters; none missing, none unread"
        + (f"; {len(report['follow_from_settings'])} follow from settings")
    )
    if report["rotary_interleaved"] is not None:
        print(f"rotary_interleaved={report['rotary_interleaved']}")


if __name__ == "__main__":
    main()
