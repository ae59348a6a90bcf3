"""The page as one HTML file: style, script and data inside, nothing fetched.

What models and tools wrote is data only: it is embedded compressed and in base64, and the script
makes text nodes of it. The page's own policy lets nothing run but this one script and nothing be
fetched but, under `--serve`, from the server that it came from.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files

from elpo_ray.runs.log import Notice
from elpo_ray.view.book import Book

SCRIPTS = (
    "dom.js",
    "theme.js",
    "data.js",
    "scale.js",
    "charts.js",
    "table.js",
    "run.js",
    "layout.js",
    "canvas.js",
    "searches.js",
    "details.js",
    "tree.js",
    "app.js",
)
"""The files of the page's one script, in the order of their use."""
MAX_BYTES = 90_000_000
"""Bytes of chunks in one page; beyond them the trees of the oldest steps are only listed."""


def whole_page(book: Book, max_bytes: int = MAX_BYTES) -> str:
    """The self-contained page of a refreshed book."""
    embedded = {name: base64.b64encode(data).decode() for name, data in book.chunks().items()}
    absent, size = [], sum(map(len, embedded.values()))
    for name in list(embedded):
        if size <= max_bytes:
            break
        size -= len(embedded.pop(name))
        absent.append(name)
    notices = []
    if absent:
        text = (
            f"this page holds {max_bytes / 1e6:.0f} MB of trees; older ones are listed, but open "
            "only under `python -m elpo_ray.view RUN --serve`"
        )
        first, last = (name.split("-")[0] for name in (absent[0], absent[-1]))
        notices.append(Notice(text, f"steps {first} to {last}"))
    overview = base64.b64encode(book.overview(absent, notices)).decode()
    data = [f'<script type="text/plain" id="overview">{overview}</script>']
    data += [
        f'<script type="text/plain" id="chunk-{name}">{text}</script>'
        for name, text in embedded.items()
    ]
    return assemble(f"{book.run.resolve().name} · elpo_ray", SCRIPTS, "\n".join(data))


def live_page(title: str) -> str:
    """The page without data, which asks its server for it."""
    return assemble(f"{title} · elpo_ray", SCRIPTS, '<meta name="source" content="live">')


def assemble(title: str, scripts: tuple[str, ...], data: str) -> str:
    """`assets/page.html` filled in; `data` goes into the body before the script."""
    assets = files("elpo_ray.view") / "assets"
    parts = [(assets / name).read_text(encoding="utf-8") for name in scripts]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (assets / "page.html").read_text(encoding="utf-8")
    for name, value in {
        "digest": digest,
        "title": html.escape(title),
        "style": (assets / "style.css").read_text(encoding="utf-8"),
        "script": script,
        "data": data,
    }.items():
        page = page.replace(f"<!--{name}-->", value, 1)
    return page
