"""`python -m elpo_ray.view RUN [--serve]`: the rollout trees of a run in a browser.

Exit codes: 0 done, or Ctrl-C of a server; 2 a mistake in the call or a folder that holds no run,
one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from elpo_ray.config.arguments import Parser
from elpo_ray.runs.atomic import write_whole
from elpo_ray.view.book import Book
from elpo_ray.view.page import whole_page
from elpo_ray.view.records import PageLimits
from elpo_ray.view.server import make_server

EPILOG = """\
Without --serve the page is one file that needs no network: copy it, mail it, open it years later.
Credit is computed while reading, by elpo_ray.credit with the run's own config.yaml.
"""
PAGE = "view.html"
PORT = 8047


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    description = "The rollout trees of a run, their credit and the run's curves in a browser."
    parser = Parser("view", description, EPILOG)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, as in runs/NAME")
    parser.add_argument("--out", metavar="FILE", help=f"page (RUN/{PAGE})")
    parser.add_argument(
        "--serve", action="store_true", help="serve it on loopback, following the run"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"of --serve ({PORT}; 0 = any)")
    parser.add_argument(
        "--chars",
        type=int,
        default=PageLimits().chars,
        metavar="N",
        help=f"of a turn or response on the page ({PageLimits().chars})",
    )
    arguments = parser.parse_args(argv)
    if arguments.chars < 2 or not 0 <= arguments.port < 1 << 16:
        parser.error("--chars takes 2 or more, --port 0 to 65535")
    if arguments.out == "":
        parser.error(f"--out is empty; name a file, or leave it out for RUN/{PAGE}")
    page = arguments.run / PAGE if arguments.out is None else Path(arguments.out)

    def command() -> None:
        book = Book(arguments.run, PageLimits(chars=arguments.chars))
        if arguments.serve:
            serve(book, arguments.port)
        else:
            write(book, page)

    return parser.run(command)


def write(book: Book, path: Path) -> None:
    """Make the page and say where it is. Raises ValueError if it cannot be written."""
    book.refresh()
    page = whole_page(book)
    try:
        write_whole(path, page)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; name another place with --out FILE, or use --serve"
        ) from error
    size = path.stat().st_size / 1e6
    print(f"{path}  (trees: {book.num_trees}, steps: {book.num_steps}, {size:.1f} MB)")
    print("open it in a browser")


def serve(book: Book, port: int) -> None:
    """Serve until Ctrl-C. Raises ValueError if the port is taken."""
    try:
        server = make_server(book, port)
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; choose another, or 0") from error
    with server:
        print(f"{book.run} is at http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C ends it)")
        sys.stdout.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    sys.exit(main())
