import os
import resource
import stat

import msgspec
import pytest

from gateway.intents import DIRECTORY_NAME, NO_SLOT, SLOT_BYTES, Intents, recover_orphans
from gateway.ledger_row import DISPATCH_COLUMNS
from gateway.stores.sqlite import DATABASE_NAME, StorageError, open_database
from tests.support.ledger_rows import a_row, rows_in


def an_intent(request_id: str, **fields):
    return msgspec.structs.astuple(a_row(request_id, **fields))[:DISPATCH_COLUMNS]


def abandon(intents: Intents) -> None:
    """As a kill does it: the map's content stays, the lock goes."""
    intents._map.close()
    os.close(intents._descriptor)


def files_in(storage) -> list[str]:
    return sorted(path.suffix for path in (storage / DIRECTORY_NAME).iterdir())


@pytest.fixture
def intents(tmp_path) -> Intents:
    return Intents(tmp_path, "0-1", slots=4)


def test_a_request_under_way_is_recovered_as_interrupted(tmp_path, intents) -> None:
    intents.open(an_intent("a"))
    abandon(intents)
    assert recover_orphans(tmp_path) == 1
    row = rows_in(tmp_path)["a"]
    assert (row.ended, row.status, row.key_id, row.is_estimated) == ("interrupted", 0, "k1", True)
    assert row.cost_nanousd is row.output_tokens is None
    assert files_in(tmp_path) == []


def test_a_settled_request_is_recovered_with_its_row(tmp_path, intents) -> None:
    intents.settle(intents.open(an_intent("a")), a_row("a"))
    assert intents.settle(NO_SLOT, a_row("never opened")) != NO_SLOT
    abandon(intents)
    assert recover_orphans(tmp_path) == 2
    assert rows_in(tmp_path) == {"a": a_row("a"), "never opened": a_row("never opened")}


def test_what_is_in_the_ledger_already_is_not_entered_twice(tmp_path, intents) -> None:
    intents.settle(intents.open(an_intent("a")), a_row("a"))
    intents.open(an_intent("b"))
    abandon(intents)
    (path,) = (tmp_path / DIRECTORY_NAME).iterdir()
    copy = path.read_bytes()
    assert recover_orphans(tmp_path) == 2
    path.write_bytes(copy)
    assert recover_orphans(tmp_path) == 0
    assert len(rows_in(tmp_path)) == 2


def test_a_freed_slot_leaves_nothing_to_recover(tmp_path, intents) -> None:
    slot = intents.settle(intents.open(an_intent("a")), a_row("a"))
    intents.free([slot])
    assert intents.in_use == 0
    abandon(intents)
    assert recover_orphans(tmp_path) == 0


def test_a_reused_slot_does_not_hand_on_the_row_before(tmp_path, intents) -> None:
    slot = intents.settle(intents.open(an_intent("a")), a_row("a"))
    intents.free([slot])
    assert intents.open(an_intent("b")) == slot
    abandon(intents)
    recover_orphans(tmp_path)
    assert {id_: row.ended for id_, row in rows_in(tmp_path).items()} == {"b": "interrupted"}


@pytest.mark.parametrize("at", [0, 4, 8, 40])
def test_a_torn_record_is_not_taken_for_a_row(tmp_path, intents, at) -> None:
    torn = intents.settle(intents.open(an_intent("torn row")), a_row("torn row"))
    half = intents.open(an_intent("half an intent"))
    intents.open(an_intent("whole"))
    row_at = torn + 352
    intents._map[row_at + at] ^= 0xFF
    intents._map[half + at] ^= 0xFF
    abandon(intents)
    assert recover_orphans(tmp_path) == 2
    assert {id_: row.ended for id_, row in rows_in(tmp_path).items()} == {
        "torn row": "interrupted",
        "whole": "interrupted",
    }


def test_without_a_free_slot_requests_go_on_and_are_counted(intents) -> None:
    slots = [intents.open(an_intent(f"r{n}")) for n in range(4)]
    assert sorted(slots) == [SLOT_BYTES * n for n in (1, 2, 3, 4)]
    assert intents.open(an_intent("r4")) == NO_SLOT
    assert intents.settle(NO_SLOT, a_row("r4")) == NO_SLOT
    assert intents.missed == 1
    intents.free([slots[0]])
    assert intents.open(an_intent("r5")) == slots[0]
    intents.free(slots)
    intents.close()


@pytest.mark.parametrize("letter", ["x", "\N{SNOWMAN}", "\N{GRINNING FACE}"])
def test_texts_too_long_for_a_slot_are_cut_and_the_money_is_not(tmp_path, intents, letter) -> None:
    texts = ["worker", "key_id", "key_name", "team", "requested_model", "provider", "target", "endpoint"]
    texts += ["served_model", "error_kind", "service_tier", "price_source", "card_hash"]
    long = dict.fromkeys(texts, letter * 2000) | {"tags": '["' + letter * 3000 + '"]'}
    numbers = dict.fromkeys(("input_tokens", "output_tokens", "duration_us", "saved_nanousd"), 2**40)
    row = a_row("i" * 64, cost_nanousd=2**62, **long, **numbers)
    intents.settle(intents.open(msgspec.structs.astuple(row)[:DISPATCH_COLUMNS]), row)
    intents.open(an_intent("j" * 64, **{k: v for k, v in long.items() if k in row.__struct_fields__[:14]}))
    abandon(intents)
    assert recover_orphans(tmp_path) == 2
    found = rows_in(tmp_path)
    assert found["i" * 64].cost_nanousd == 2**62
    assert found["i" * 64].tags == "[]"
    assert found["i" * 64].requested_model.startswith(letter * 5)
    assert found["j" * 64].ended == "interrupted"


def test_the_file_of_a_living_worker_is_left_alone(tmp_path, intents) -> None:
    slot = intents.open(an_intent("a"))
    assert recover_orphans(tmp_path) == 0
    assert files_in(tmp_path) == [".slots"]
    intents.free([slot])
    intents.close()
    assert files_in(tmp_path) == []


def test_a_file_closed_with_requests_under_way_stays_for_recovery(tmp_path, intents) -> None:
    intents.open(an_intent("a"))
    intents.close()
    assert recover_orphans(tmp_path) == 1


def test_only_the_owner_may_read_the_file(tmp_path, intents) -> None:
    assert stat.S_IMODE(intents.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(intents.path.parent.stat().st_mode) == 0o700
    intents.close()


def test_a_worker_killed_while_it_made_its_file_leaves_nothing_to_recover(tmp_path) -> None:
    directory = tmp_path / DIRECTORY_NAME
    directory.mkdir()
    (directory / "empty.slots").touch()
    (directory / "zeros.slots").write_bytes(bytes(5 * SLOT_BYTES))
    assert recover_orphans(tmp_path) == 0
    assert files_in(tmp_path) == []


def test_a_file_that_cannot_be_read_is_set_aside_not_deleted(tmp_path, caplog) -> None:
    directory = tmp_path / DIRECTORY_NAME
    directory.mkdir()
    (directory / "x.slots").write_bytes(b"something else" * 1000)
    assert recover_orphans(tmp_path) == 0
    assert files_in(tmp_path) == [".damaged"]
    assert "set aside" in caplog.text


def test_recovery_without_anything_to_recover_needs_no_directory(tmp_path) -> None:
    assert recover_orphans(tmp_path / "nowhere") == 0


def test_when_the_ledger_cannot_be_written_the_orphans_stay(tmp_path, intents) -> None:
    intents.open(an_intent("a"))
    abandon(intents)
    (tmp_path / DATABASE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match="is not a SQLite database"):
        recover_orphans(tmp_path)
    (tmp_path / DATABASE_NAME).unlink()
    assert recover_orphans(tmp_path) == 1


def test_without_room_for_the_file_the_start_fails_with_a_sentence(tmp_path) -> None:
    open_database(tmp_path / DATABASE_NAME).close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"Cannot reserve 4097 KiB .* Free some space"):
            Intents(tmp_path, "0-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == []


def test_a_row_the_ledger_refuses_does_not_keep_the_others_from_being_recovered(
    tmp_path, intents, caplog
) -> None:
    intents.settle(intents.open(an_intent("bad")), a_row("bad", cost_nanousd=2**63))
    intents.settle(intents.open(an_intent("good")), a_row("good"))
    abandon(intents)
    assert recover_orphans(tmp_path) == 2
    assert {id_: row.ended for id_, row in rows_in(tmp_path).items()} == {
        "bad": "interrupted",
        "good": "completed",
    }
    assert "request bad was refused" in caplog.text
