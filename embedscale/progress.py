"""Draw progress bars on the terminal, all of them with rich and all of them here.

A bar is drawn on stderr, so that the output of a command can still be piped. Where stderr is not a terminal, nothing is
drawn: a log file has no use for a line that is written again and again.
"""

from types import TracebackType
from typing import Any

from embedscale.terminal import console


class Bar:
    """A progress bar, or a spinner where the amount of work is not known.

    with Bar("encoding", total=len(texts)) as bar:
        for some in parts:
            …
            bar.advance(len(some))

    `what` is written before the bar, and the text given to `say` behind the bar. `total` is the amount of work; with
    `share`, a percentage is shown instead of the two amounts. Bars without a `total` disappear when they end.
    """

    def __init__(self, what: str, total: float | None = None, completed: float = 0, share: bool = False):
        # Imported late: rich.progress takes a twentieth of a second, and most commands draw no bar.
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        name = TextColumn("{task.description}", markup=False)
        text = TextColumn("{task.fields[text]}", markup=False)
        amount = TextColumn("{task.percentage:>3.0f} %") if share else MofNCompleteColumn()
        columns: tuple[ProgressColumn, ...] = (name, BarColumn(), amount, text, TimeRemainingColumn())
        if total is None:
            columns = (SpinnerColumn(), name, text, TimeElapsedColumn())
        output = console(stderr=True)
        self.drawn = output.is_terminal
        # `disable` alone would still print an empty line at the end of a spinner.
        self._progress = Progress(*columns, console=output, disable=not self.drawn, transient=total is None)
        self._task = self._progress.add_task(what, total=total, text="")
        self._progress.update(self._task, completed=completed)

    def __enter__(self) -> "Bar":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to draw."""
        if self.drawn:
            self._progress.start()

    def stop(self) -> None:
        """Draw the bar a last time, and give the terminal back."""
        if self.drawn:
            self._progress.stop()

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more of the total as done."""
        self._progress.advance(self._task, amount)

    def say(self, text: str, completed: float | None = None) -> None:
        """Show `text` behind the bar; set the amount done to `completed` where one is given."""
        values: dict[str, Any] = {} if completed is None else {"completed": completed}
        self._progress.update(self._task, text=text, **values)
