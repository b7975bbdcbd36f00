import io

import pytest
from rich.console import Console

from gateway.commands.tables import Column, print_table

COLUMNS = (
    Column("key", folds=True),
    Column("requests", is_number=True),
    Column("prompt", is_number=True, rank=1),
    Column("errors", is_number=True, rank=2),
    Column("cost", is_number=True),
)
ROW = ("a key with a long name", "1,234,567", "987,654,321", "12", "$1,234.000000001")
TOTAL = ("total", "2,234,567", "1,987,654,321", "13", "$2,234.000000001")


def shown(width: int, *, is_terminal: bool, footer: tuple[str, ...] = ()) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    print_table(COLUMNS, [ROW], footer, console)
    return file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60, 45])
def test_no_number_is_broken_on_any_terminal(width):
    text = shown(width, is_terminal=True, footer=TOTAL)
    for cell in ("1,234,567", "$1,234.000000001", "$2,234.000000001"):
        assert cell in text


@pytest.mark.parametrize("width", [200, 80, 60, 45])
def test_nothing_is_wider_than_the_terminal(width):
    table, _, note = shown(width, is_terminal=True).partition("Not shown")
    assert max(map(len, table.splitlines())) <= width
    assert bool(note) == (width < 80)


def test_the_least_important_columns_go_first_and_the_table_says_which():
    assert "because the terminal is narrow: errors." in shown(60, is_terminal=True)
    assert "because the terminal is narrow: prompt, errors." in shown(50, is_terminal=True)


def test_a_name_folds_before_a_column_goes():
    assert "a key with" in shown(65, is_terminal=True)
    assert "a key with a long name" not in shown(65, is_terminal=True)
    assert "errors" in shown(65, is_terminal=True).splitlines()[0]


def test_a_pipe_gets_every_column_on_one_line():
    lines = shown(20, is_terminal=False, footer=TOTAL).splitlines()
    assert [line.split() for line in lines if "$1" in line] == [[*ROW[0].split(), *ROW[1:]]]
    assert [line.split() for line in lines if "$2" in line] == [list(TOTAL)]


def test_cells_are_text_and_not_markup():
    file = io.StringIO()
    print_table((Column("name"),), [("[bold]odd[/]",)], console=Console(file=file, width=80))
    assert "[bold]odd[/]" in file.getvalue()


def test_an_empty_table_is_its_head():
    file = io.StringIO()
    print_table(COLUMNS, [], console=Console(file=file, width=80))
    assert file.getvalue().split()[:2] == ["key", "requests"]
