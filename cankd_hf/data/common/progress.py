"""Progress of what takes more than a few seconds before training."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress

LONG = 3.0  # seconds after which a bar is shown


class Told:
    """A bar with the time that is left, on a terminal, once the work has taken `LONG` seconds.

    Args:
        text: what is done.
        total: its size, in any unit.
    """

    def __init__(self, text: str, total: int) -> None:
        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(text, total=total)
        self._begun = False

    def __enter__(self) -> "Told":
        return self

    def to(self, done: int) -> None:
        """Tells how much is done."""
        self._bar.update(self._task, completed=done)
        if not self._begun and (self._bar.tasks[0].elapsed or 0) > LONG:
            self._begun = True
            self._bar.start()

    def __exit__(self, *_: Any) -> None:
        if self._begun:
            self._bar.stop()


def told(items: Iterable[Any], text: str, total: int) -> Iterator[Any]:
    """Passes items on, with a bar where that takes long."""
    with Told(text, total) as bar:
        for done, item in enumerate(items):
            bar.to(done)
            yield item
