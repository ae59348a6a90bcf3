"""matplotlib's figures inside a session, shown as a notebook shows them.

A figure is shown, and closed, by `show` or at the end of the cell that opened it. matplotlib itself
is never imported here: a session whose code does not import it pays for nothing. Like all that runs
beside hostile code, this only tries to serve honest code well.
"""

from __future__ import annotations

import io
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sandbox.limits import MAX_FIGURES, MAX_FIGURES_BYTES
from sandbox.png import MAX_PIXELS, MAX_SIDE

_WINDOWS, _OPEN, _FIGURE = (
    f"matplotlib.{name}" for name in ("backend_bases", "_pylab_helpers", "figure")
)


class Gallery:
    """The figures that one cell after the other shows."""

    def __init__(self) -> None:
        self._shown: list[bytes] = []
        self._notes: list[str] = []
        if _WINDOWS in sys.modules:
            self.attend(sys.modules[_WINDOWS])
        else:
            sys.meta_path.insert(0, _Awaits(self))

    def attend(self, windows: ModuleType) -> None:
        """Be what shows the windows of `matplotlib.backend_bases`."""
        windows.FigureManagerBase.show = lambda window, *_, **__: self._show(window)

    def take(self, value: object) -> tuple[list[bytes], list[str]]:
        """Figures that the cell showed or left open, and `value`, its last one, if that is another:
        as PNG, with what there is to say of those that are left out."""
        if _OPEN in sys.modules:
            windows = sys.modules[_OPEN].Gcf.get_all_fig_managers()
            if self._is_figure(value) and value not in [each.canvas.figure for each in windows]:
                self._add(value)
            for window in windows:
                self._show(window)
        taken = self._shown, self._notes
        self._shown, self._notes = [], []
        return taken

    @staticmethod
    def _is_figure(value: object) -> bool:
        return _FIGURE in sys.modules and isinstance(value, sys.modules[_FIGURE].Figure)

    def _show(self, window: Any) -> None:
        try:
            self._add(window.canvas.figure)
        finally:
            sys.modules[_OPEN].Gcf.destroy(window)

    def _add(self, figure: Any) -> None:
        if not figure.axes and not figure.lines:  # nothing to see, as in a notebook
            return
        width, height = (int(side) for side in figure.bbox.size)
        drawn = io.BytesIO()
        try:
            if len(self._shown) >= MAX_FIGURES:
                raise ValueError(f"a call may show {MAX_FIGURES}")
            if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            figure.canvas.print_figure(drawn, format="png", dpi=figure.dpi)
            if sum(map(len, self._shown)) + drawn.tell() > MAX_FIGURES_BYTES:
                raise ValueError(f"the figures of a call may have {MAX_FIGURES_BYTES >> 20} MiB")
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            self._notes.append(f"[a figure is left out: {why:.200}]")
        else:
            self._shown.append(drawn.getvalue())


class _Awaits(MetaPathFinder):
    """Tells the gallery when matplotlib's windows are imported."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """None, except for the one module, which is found as it would be without this."""
        if fullname != _WINDOWS:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_tell(module: ModuleType) -> None:
                load(module)
                self._gallery.attend(module)

            spec.loader.exec_module = load_and_tell  # type: ignore[method-assign]
        return spec
