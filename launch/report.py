"""A run as one HTML page that works without a network.

    python -m launch.report RUN [--out PAGE.html|FOLDER]

RUN is a run's folder; it may still be running. Default page: RUN/report.html.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# before launch/, which holds a module of the same name as a room
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.interrupted import say_interrupted
from pretrain.html_report import write_html_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.report", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--out", type=Path, help="the page to write, or a folder for it (default: RUN)"
    )
    given = parser.parse_args(arguments)
    try:
        page = given.out
        if page is not None and page.is_dir():
            page = page / "report.html"
        page = write_html_report(given.run, page)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB); open it in a browser")
    return 0


if __name__ == "__main__":
    say_interrupted()
    sys.exit(main())
