"""Ledger rows as a Parquet file.

Needs the optional `pyarrow` (`pip install 'headgate[parquet]'`), so nothing imports this module at start-up:
`headgate costs export` loads it when it is asked for Parquet.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from gateway.ledger_row import COLUMNS, LedgerRow, record_of
from policies.waste import Waste

_GROUP_ROWS: Final = 20_000
_TYPES: Final[dict[Any, Any]] = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), int | None: pa.int64()}


def _type_of(column: str) -> Any:
    if column == "tags":
        return pa.list_(pa.string())
    if column == "failed_attempts":
        return pa.list_(
            pa.struct([(name, _TYPES[annotation]) for name, annotation in Waste.__annotations__.items()])
        )
    return pa.string() if column == "session_hash" else _TYPES[LedgerRow.__annotations__[column]]


SCHEMA: Final = pa.schema([(column, _type_of(column)) for column in COLUMNS])


def write(rows: Iterable[LedgerRow], file: BinaryIO) -> int:
    """Writes the rows, one group of them in memory at a time; returns how many there were."""
    count = 0
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for group in _groups(iter(rows)):
            writer.write_table(pa.Table.from_pylist([record_of(row) for row in group], SCHEMA))
            count += len(group)
    return count


def _groups(rows: Iterator[LedgerRow]) -> Iterator[list[LedgerRow]]:
    while group := list(islice(rows, _GROUP_ROWS)):
        yield group
