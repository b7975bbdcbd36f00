import apsw
import pytest

from gateway.ledger_row import COLUMNS
from gateway.stores import ledger_table
from gateway.stores.ledger_table import BadRowError
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database
from tests.support.ledger_rows import a_row, rows_in


@pytest.fixture
def connection(tmp_path):
    with database(tmp_path / DATABASE_NAME) as connection:
        yield connection


def test_the_tables_columns_are_the_rows_fields_in_their_order(connection) -> None:
    assert tuple(row[1] for row in connection.execute("PRAGMA table_info(ledger)")) == COLUMNS


def test_a_row_comes_back_as_it_was(connection, tmp_path) -> None:
    row = a_row(
        tags='["a","b"]', session_hash=-(2**63), cost_nanousd=2**63 - 1, saved_nanousd=-5, ttft_us=None
    )
    assert ledger_table.insert(connection, [row]) == 1
    assert rows_in(tmp_path) == {"req_1": row}


def test_a_request_is_entered_once_however_often_it_is_inserted(connection, tmp_path) -> None:
    first, other = a_row("a", cost_nanousd=1), a_row("b")
    assert ledger_table.insert(connection, [first, a_row("a", cost_nanousd=2)]) == 1
    assert ledger_table.insert(connection, [a_row("a", cost_nanousd=3), other]) == 1
    assert rows_in(tmp_path) == {"a": first, "b": other}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger SET cost_nanousd = 0",
        "DELETE FROM ledger",
        "INSERT OR REPLACE INTO ledger SELECT * FROM ledger",
    ],
)
def test_what_is_entered_can_be_neither_changed_nor_deleted(connection, tmp_path, statement) -> None:
    ledger_table.insert(connection, [a_row()])
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        connection.execute(statement)
    assert rows_in(tmp_path) == {"req_1": a_row()}


@pytest.mark.parametrize(
    "bad", [{"cost_nanousd": 2**63}, {"team": None}, {"status": "x"}, {"team": "\ud800"}]
)
def test_a_group_with_an_impossible_row_is_refused_whole(connection, tmp_path, bad) -> None:
    with pytest.raises(BadRowError):
        ledger_table.insert(connection, [a_row("good"), a_row("bad", **bad)])
    assert rows_in(tmp_path) == {}
    assert ledger_table.insert(connection, [a_row("good")]) == 1


def test_a_full_database_takes_nothing_and_says_so(connection, tmp_path) -> None:
    connection.pragma("max_page_count", connection.pragma("page_count") + 3)
    with pytest.raises(StorageError, match="No space left"):
        ledger_table.insert(connection, [a_row(f"r{n}", team="x" * 1000) for n in range(50)])
    assert rows_in(tmp_path) == {}
    connection.pragma("max_page_count", 2**30)
    assert ledger_table.insert(connection, [a_row()]) == 1
