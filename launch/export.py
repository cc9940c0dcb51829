"""Write a run's checkpoint as a folder that `transformers` loads.

    python -m launch.export runs/demo/DATE exported
    python -m launch.export runs/demo/DATE exported --step 50 --dtype bf16

Any layout's checkpoint, on one process and its CPU. The folder has the weights (safetensors), the
settings, the tokenizer, a model card, where needed the model's code, and export_report.json: how
the logits were compared, and checksums. Exit status: 0 written, 2 not, with nothing left.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

# before launch/, where `import pretrain` would find pretrain.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted
from launch.command_line import run_on_one_cpu


def main() -> None:
    options = parse(sys.argv[1:])
    run_on_one_cpu(lambda: _export(options))


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="run folder, checkpoints folder or checkpoint")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        help="of the weights written (fp16 too, which runs do not train in); default: as stored",
    )
    parser.add_argument("--max-file-gb", type=float, default=5.0, help="of one file of weights")
    parser.add_argument("--tokenizer", default="", help="its file; default: the run's")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare logits, which holds the whole model in memory",
    )
    return parser.parse_args(words)


def _refuse_early(options: argparse.Namespace) -> None:
    """What can be told before anything is imported and written, which takes its time."""
    from pretrain.checkpoint_list import find_checkpoint

    if options.max_file_gb <= 0:
        raise ValueError(f"--max-file-gb={options.max_file_gb} must be above 0")
    if options.out.exists():
        raise FileExistsError(f"{options.out} exists already; name another folder, or remove it")
    find_checkpoint(options.path, options.step)
    if not options.no_check and find_spec("transformers") is None:
        raise ValueError(
            "transformers, which checks what is written, is not installed: pip install "
            "'magnetron[export]', or leave the check out with --no-check"
        )


def _export(options: argparse.Namespace) -> None:
    _refuse_early(options)
    from pretrain.convert_checkpoint import DTYPES
    from pretrain.export import export

    report = export(
        options.path,
        options.out,
        step=options.step,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        max_bytes=int(options.max_file_gb * 1e9),
        tokenizer=options.tokenizer,
        check=not options.no_check,
    )
    check = report["check"]
    agreement = "not checked"
    if check is not None:
        agreement = (
            f"logits of {check['tokens']} tokens within {check['max_abs_difference']:.1e} of the "
            f"checkpoint's (largest {check['largest_logit']:.3g}), "
            f"{check['greedy_tokens']} greedy tokens equal"
        )
    source = report["source"]["checkpoint"]
    print(f"{source} -> {options.out} ({report['architecture']}): {agreement}")


if __name__ == "__main__":
    say_interrupted()
    main()
