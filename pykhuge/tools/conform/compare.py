"""One layout in both, what differs, and the smallest layout that still shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

from pykhuge.kernel.version import KernelVersion
from pykhuge.tools.conform.host import Host, HostError
from pykhuge.tools.conform.layout import STROKES, Layout, Stroke, UnfitLayout
from pykhuge.tools.conform.model import in_model
from pykhuge.tools.conform.observe import Outcome

__all__ = ["Comparison", "compare", "shrink"]

# The kernel is asked again before it counts: a page may have been in somebody's hands.
TRIES = 3


@dataclass
class Comparison:
    """A layout, what became of it in both, and the names of what differs.

    again: how often the kernel was asked again, and at last agreed. error: it, or the model, broke.
    unfit: why it was not built.
    """

    layout: Layout
    kernel: Outcome | None = None
    model: Outcome | None = None
    differs: tuple[str, ...] = ()
    again: int = 0
    error: str = ""
    unfit: str = ""

    @property
    def agrees(self) -> bool:
        """Whether nothing differs and nothing broke."""
        return not self.differs and not self.error


def compare(layouts: Iterable[Layout], host: Host, version: KernelVersion) -> Iterator[Comparison]:
    """Build each in the model and, if it is a fit one, in the kernel meanwhile, and compare.

    The model comes first: what would not end in the kernel is not begun there.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[Comparison, Future[Outcome]] | None = None
        for layout in layouts:
            try:
                comparison = Comparison(layout, model=in_model(layout, kernel=version))
            except UnfitLayout as unfit:
                yield Comparison(layout, unfit=unfit.reason)
                continue
            except Exception as error:  # it is what is looked for
                comparison = Comparison(layout, error=f"the model: {error!r}")
            if waiting:
                yield _judged(*waiting, host)
            waiting = comparison, pool.submit(host.run, layout)
        if waiting:
            yield _judged(*waiting, host)


def _judged(result: Comparison, kernel: Future[Outcome], host: Host) -> Comparison:
    """With what the kernel made of it, which is asked again if that is not the same."""
    if result.model is None:
        kernel.exception()
        return result
    for result.again in range(TRIES):
        try:
            result.kernel = host.run(result.layout) if result.again else kernel.result()
        except HostError as error:
            result.error = f"the kernel: {error}"
            continue
        result.error = ""
        result.differs = tuple(result.kernel.differences(result.model))
        if not result.differs:
            break
    return result


def shrink(layout: Layout, differs: Callable[[Layout], bool]) -> Layout:
    """A smallest layout for which `differs` still holds: no step from it keeps that."""
    while True:
        for smaller in _smaller(layout):
            if differs(smaller):
                layout = smaller
                break
        else:
            return layout


def _smaller(layout: Layout) -> Iterator[Layout]:
    """Layouts a step simpler, the boldest steps first; those that are none are left out."""
    for candidate in _candidates(layout):
        try:
            yield candidate()
        except ValueError:
            continue


def _candidates(layout: Layout) -> Iterator[Callable[[], Layout]]:
    strokes = layout.strokes
    for place in reversed(range(len(strokes))):
        rest = strokes[:place] + strokes[place + 1 :]
        yield lambda rest=rest: replace(layout, strokes=rest)  # type: ignore[misc]
    for field in fields(Layout)[1:-1]:
        if getattr(layout, field.name) != field.default:
            plain = {field.name: field.default}
            yield lambda plain=plain: replace(layout, **plain)  # type: ignore[misc]
    for place, stroke in enumerate(strokes):
        for simpler in _simpler(stroke):
            fewer = (*strokes[:place], simpler, *strokes[place + 1 :])
            yield lambda fewer=fewer: replace(layout, strokes=fewer)  # type: ignore[misc]


def _simpler(stroke: Stroke) -> Iterator[Stroke]:
    if STROKES[stroke.name] != "range":
        return
    if stroke.step > 1:
        yield stroke._replace(step=1)
    if stroke.nr > 1:
        half = stroke.nr // 2
        yield stroke._replace(nr=1)
        yield stroke._replace(nr=half)
        yield stroke._replace(first=stroke.first + half, nr=stroke.nr - half)
        yield stroke._replace(nr=stroke.nr - 1)
        yield stroke._replace(first=stroke.first + 1, nr=stroke.nr - 1)
