"""Tables for people: numbers, money and ids are never broken over lines.

Owns what gives way when a terminal is too narrow: columns that may fold fold, then the least important ones are
left out, and that is said. A file or a pipe gets every column, as wide as it needs.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_GAP: Final = 2
_FOLDED: Final = 12  # a column that folds is not made narrower


class Column(NamedTuple):
    """`rank` orders what is left out first (the highest); 0: never."""

    title: str
    is_number: bool = False
    folds: bool = False
    rank: int = 0


def print_table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    footer: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Cells are plain text, not markup. `footer`: sums, one for each column."""
    console = console or Console()
    cells = [list(row) for row in rows]
    everything = [*cells, list(footer)] if footer else cells
    widths = [_Width.of(column, [row[n] for row in everything]) for n, column in enumerate(columns)]
    shown = list(range(len(columns)))
    if console.is_terminal:
        while _sum(widths[n].least for n in shown) > console.width:
            last = max(shown, key=lambda n: (columns[n].rank, n))
            if not columns[last].rank:
                break
            shown.remove(last)
    else:
        console.width = max(console.width, _sum(width.most for width in widths))
    table = Table(
        box=box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_footer=bool(footer)
    )
    for n in shown:
        table.add_column(
            columns[n].title,
            escape(footer[n]) if footer else "",
            justify="right" if columns[n].is_number else "left",
            overflow="fold",
            no_wrap=not columns[n].folds,
            min_width=widths[n].least,
        )
    for row in cells:
        table.add_row(*(escape(row[n]) for n in shown))
    console.print(table)
    if len(shown) < len(columns):
        missing = ", ".join(column.title for n, column in enumerate(columns) if n not in shown)
        note = f"Not shown, because the terminal is narrow: {missing}."
        console.print(note, style="dim", highlight=False, soft_wrap=True)


class _Width(NamedTuple):
    least: int
    most: int

    @classmethod
    def of(cls, column: Column, cells: Sequence[str]) -> "_Width":
        most = max(map(cell_len, (column.title, *cells)))
        return cls(min(most, _FOLDED) if column.folds else most, most)


def _sum(widths: Iterable[int]) -> int:
    each = list(widths)
    return sum(each) + _GAP * (len(each) - 1)
