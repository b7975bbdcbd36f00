import re
import stat
import statistics
import threading
import time

import pytest

from gateway import keys as keys_module
from gateway.keys import (
    DeclaredKey,
    Keyring,
    NewKey,
    Operator,
    create_key,
    expiry_of,
    hash_of,
    is_well_formed,
    load_pepper,
    mint,
    pepper_id_of,
    refusal_of,
    rotate_key,
)
from gateway.stores import key_table
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database
from policies.exchange import Caller

NOW = 1_793_000_000
PEPPER = b"p" * 64
CHOSEN = "my-own-key-8fJ2kQ0zR7"


class Clock:
    now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connection(tmp_path):
    with database(tmp_path / DATABASE_NAME) as connection:
        yield connection


@pytest.fixture
def keyring(tmp_path, connection, clock):
    keyring = Keyring(tmp_path, PEPPER, clock=clock)
    yield keyring
    keyring.close()


def make(connection, name="ci", **fields) -> tuple[bytes, key_table.KeyRecord]:
    key, record = create_key(connection, PEPPER, NewKey(name, **fields), NOW)
    return key.encode(), record


def test_a_key_has_prefix_id_secret_and_checksum() -> None:
    key, key_id = mint("caller")
    assert re.fullmatch(rf"sk-hg-{key_id}_[0-9A-Za-z]{{43}}_[0-9A-Za-z]{{6}}", key)
    assert re.fullmatch(r"[0-9A-Za-z]{8}", key_id)
    assert mint("operator")[0].startswith("op-hg-")
    assert mint("caller", "12345678")[0].startswith("sk-hg-12345678_")
    assert len({mint("caller")[0] for _ in range(100)}) == 100


def test_every_typing_error_of_one_letter_is_noticed() -> None:
    key = mint("caller")[0].encode()
    assert is_well_formed(key)
    for at in range(len(key)):
        for letter in b"aZ0-":
            changed = key[:at] + bytes([letter]) + key[at + 1 :]
            assert changed == key or not is_well_formed(changed)
    for other in (b"", key[:-1], key + b"a", key + b"\n", b" " + key, key.upper(), b"sk-hg-"):
        assert not is_well_formed(other)


def test_the_checksum_is_crc32_in_base_62() -> None:
    assert is_well_formed(
        b"sk-hg-00000000_" + b"0" * 43 + b"_" + keys_module._checksum(b"sk-hg-00000000_" + b"0" * 43)
    )
    assert keys_module._checksum(b"") == b"000000"  # CRC-32 of nothing is 0
    assert keys_module._checksum(b"123456789") == b"3Jzrme"  # 0xCBF43926, the check value of CRC-32


def test_a_key_that_was_made_is_found_with_what_it_may(connection, keyring) -> None:
    key, record = make(
        connection, team="platform", models=("demo", "gpt-*"), tags=("nightly",), expires_time=NOW + 9
    )
    keyring.refresh()
    caller = keyring.find(key)
    assert isinstance(caller, Caller)
    assert (caller.key_id, caller.name, caller.team) == (record.id, "ci", "platform")
    assert (caller.models, caller.tags) == (frozenset({"demo", "gpt-*"}), ("nightly",))
    assert caller.expires_time == NOW + 9


def test_neither_kind_of_key_stands_in_for_the_other(connection, keyring) -> None:
    caller_key, _ = make(connection)
    operator_key, record = make(connection, kind="operator")
    keyring.refresh()
    assert keyring.find(operator_key) == "unknown"
    assert keyring.find_operator(caller_key) == "unknown"
    assert keyring.find_operator(operator_key) == Operator(record.id, "ci")


def test_strangers_are_unknown(connection, keyring) -> None:
    key, _ = make(connection)
    keyring.refresh()
    well_formed = mint("caller", key[6:14].decode())[0].encode()  # the right id, another secret
    for token in (b"", b"sk-1234", well_formed, key[:-1], key + b" ", bytes(600), b"\xff" * 60):
        assert keyring.find(token) == "unknown"


def test_an_expired_key_is_told_so(connection, keyring, clock) -> None:
    key, _ = make(connection, expires_time=NOW + 10)
    keyring.refresh()
    clock.now = NOW + 9.9
    assert isinstance(keyring.find(key), Caller)
    clock.now = NOW + 10.0
    assert keyring.find(key) == "expired"


def test_a_revoked_key_is_refused_and_stays_known_as_such(connection, keyring) -> None:
    key, record = make(connection)
    keyring.refresh()
    key_table.revoke(connection, record.id, NOW + 5)
    key_table.revoke(connection, record.id, NOW + 6)
    keyring.refresh()
    assert keyring.find(key) == "revoked"
    assert key_table.find(connection, record.id)[0].revoked_time == NOW + 5


def test_a_rotated_key_keeps_its_id_and_the_old_one_fades(connection, keyring, clock) -> None:
    old, record = make(connection, team="platform")
    new = rotate_key(connection, PEPPER, record, None, NOW + 60).encode()
    keyring.refresh()
    for key in (old, new):
        caller = keyring.find(key)
        assert isinstance(caller, Caller)
        assert (caller.key_id, caller.team) == (record.id, "platform")
    clock.now = NOW + 60.0
    assert keyring.find(old) == "expired"
    assert isinstance(keyring.find(new), Caller)
    newest = rotate_key(
        connection, PEPPER, key_table.find(connection, record.id)[0], None, NOW + 120
    ).encode()
    keyring.refresh()
    assert keyring.find(old) == "unknown"
    assert isinstance(keyring.find(newest), Caller)
    key_table.revoke(connection, record.id, NOW)
    keyring.refresh()
    assert keyring.find(new) == keyring.find(newest) == "revoked"


def test_the_old_key_does_not_outlive_its_own_expiry(connection, keyring, clock) -> None:
    old, record = make(connection, expires_time=NOW + 10)
    rotate_key(connection, PEPPER, record, NOW + 1000, NOW + 500)
    keyring.refresh()
    clock.now = NOW + 11.0
    assert keyring.find(old) == "expired"


def test_a_name_is_used_once_per_kind_until_it_is_revoked(connection) -> None:
    _, record = make(connection, "ci")
    make(connection, "ci", kind="operator")
    with pytest.raises(ValueError, match="'ci' already: rotate or revoke"):
        make(connection, "ci")
    key_table.revoke(connection, record.id, NOW)
    make(connection, "ci")
    for name in ("", "a\nb"):
        with pytest.raises(ValueError, match="needs a name"):
            make(connection, name)


def test_what_is_stored_does_not_hold_the_key(connection, tmp_path) -> None:
    key, record = make(connection)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = (tmp_path / DATABASE_NAME).read_bytes()
    assert key not in content
    assert key[15:58] not in content
    assert PEPPER not in content
    assert hash_of(key, PEPPER) in content
    assert record.hash == hash_of(key, PEPPER)


def test_nothing_that_is_printed_holds_a_key(keyring) -> None:
    keyring.declare([DeclaredKey("ci", CHOSEN)])
    assert CHOSEN not in repr(keyring) + repr(DeclaredKey("ci", CHOSEN)) + repr(keyring.find(CHOSEN.encode()))
    with pytest.raises(ValueError) as refused:
        keyring.declare([DeclaredKey("ci", "sk-1234-sk-1234-sk-1234-abcdef")])
    assert "sk-1234" not in str(refused.value)


def test_a_revocation_elsewhere_takes_effect_within_five_seconds(connection, keyring) -> None:
    key, record = make(connection)
    deadline = time.monotonic() + 30.0
    while keyring.find(key) == "unknown":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    key_table.revoke(connection, record.id, NOW)
    deadline = time.monotonic() + 30.0
    while keyring.find(key) != "revoked":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_while_the_database_is_away_the_known_keys_stand(
    tmp_path, connection, keyring, monkeypatch, caplog
) -> None:
    key, record = make(connection)
    keyring.refresh()
    monkeypatch.setattr(keys_module, "_POLL_S", 0.02)
    connection.execute("ALTER TABLE api_key RENAME TO away")
    deadline = time.monotonic() + 30.0
    while keyring.refresh_failures < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert isinstance(keyring.find(key), Caller)
    assert caplog.text.count("stays in force") == 1
    connection.execute("ALTER TABLE away RENAME TO api_key")
    key_table.revoke(connection, record.id, NOW)
    while keyring.find(key) != "revoked":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_restored_backup_brings_its_own_keys(connection, keyring) -> None:
    kept, _ = make(connection, "kept")
    connection.execute("CREATE TABLE backup AS SELECT * FROM api_key")
    lost, _ = make(connection, "lost")
    keyring.refresh()
    assert isinstance(keyring.find(lost), Caller)
    connection.execute("DELETE FROM api_key; INSERT INTO api_key SELECT * FROM backup")
    keyring.refresh()
    assert keyring.find(lost) == "unknown"
    assert isinstance(keyring.find(kept), Caller)


def test_keys_made_with_another_pepper_are_reported(tmp_path, connection, caplog) -> None:
    key, record = make(connection)
    keyring = Keyring(tmp_path, b"q" * 64)
    try:
        assert keyring.find(key) == "unknown"
    finally:
        keyring.close()
    assert f"key {record.id} was made with another pepper" in caplog.text
    assert pepper_id_of(PEPPER) != pepper_id_of(b"q" * 64)


def test_a_declared_key_is_found_until_it_is_taken_out(keyring, clock) -> None:
    keyring.declare(
        [
            DeclaredKey("ci", CHOSEN, team="platform", models=frozenset({"demo"}), expires_time=NOW + 5.5),
            DeclaredKey("root", CHOSEN + "2", kind="operator"),
        ]
    )
    caller = keyring.find(CHOSEN.encode())
    assert isinstance(caller, Caller)
    assert (caller.key_id, caller.name, caller.team, caller.models) == (
        "config:ci",
        "ci",
        "platform",
        {"demo"},
    )
    assert keyring.find(CHOSEN.encode() + b"2") == "unknown"
    assert keyring.find_operator(CHOSEN.encode() + b"2") == Operator("config:root", "root")
    clock.now = NOW + 5.5
    assert keyring.find(CHOSEN.encode()) == "expired"
    keyring.declare([])
    assert keyring.find(CHOSEN.encode()) == "unknown"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("sk-1234", "too short"),
        ("changeme", "too short"),
        ("sk-1234567890abcdefghij", "is an example"),
        ("please-changeme-right-now", "is an example"),
        ("your-api-key-goes-here-ok", "is an example"),
        ("aaaaaaaaaaaaaaaaaaaaaaaa", "is an example"),
        ("sk-with blanks in between", "cannot be sent"),
        ("sk-w\N{LATIN SMALL LETTER O WITH DIAERESIS}rd-8fJ2kQ0zR7abc", "cannot be sent"),
        ("x8fJ2kQ0zR7" * 60, "too long"),
        ("sk-hg-00000000_" + "0aBcDeFgHi" * 5, "checksum is wrong"),
    ],
)
def test_a_key_that_is_no_secret_is_refused_with_the_reason(keyring, value, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        keyring.declare([DeclaredKey("ci", value)])


def test_a_good_chosen_key_is_accepted() -> None:
    for value in (CHOSEN, mint("caller")[0], "sk-proj-8fJ2kQ0zR7LmNoPq"):
        assert refusal_of(value) is None


def test_declared_names_and_keys_must_differ_and_a_bad_set_changes_nothing(keyring) -> None:
    keyring.declare([DeclaredKey("ci", CHOSEN)])
    for keys in (
        [DeclaredKey("a", CHOSEN + "a"), DeclaredKey("a", CHOSEN + "b")],
        [DeclaredKey("a", CHOSEN + "a"), DeclaredKey("b", CHOSEN + "a")],
        [DeclaredKey("a", CHOSEN + "a"), DeclaredKey("b", "short")],
    ):
        with pytest.raises(ValueError, match=r"declared twice|too short"):
            keyring.declare(keys)
    assert isinstance(keyring.find(CHOSEN.encode()), Caller)
    assert keyring.find(CHOSEN.encode() + b"a") == "unknown"


def test_finding_costs_one_hash_whether_the_key_exists_or_not(connection, keyring, monkeypatch) -> None:
    key, record = make(connection)
    revoked, gone = make(connection, "gone")
    key_table.revoke(connection, gone.id, NOW)
    keyring.refresh()
    hashed = []
    real = keys_module.hash_of
    monkeypatch.setattr(keys_module, "hash_of", lambda *a: hashed.append(a) or real(*a))
    tokens = [key, revoked, mint("caller")[0].encode(), mint("caller", record.id)[0].encode()]
    for token in tokens:
        keyring.find(token)
    assert [token for token, _ in hashed] == tokens


def test_finding_a_key_takes_microseconds(connection, keyring) -> None:
    key, _ = make(connection)
    keyring.refresh()
    times = []
    for _ in range(500):
        started = time.perf_counter()
        keyring.find(key)
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 100e-6


def test_the_pepper_is_made_once_for_its_owner_only(tmp_path) -> None:
    storage = tmp_path / "new"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(load_pepper(storage))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found[0]) == 64
    assert stat.S_IMODE((storage / "pepper").stat().st_mode) == 0o600
    assert [path.name for path in storage.iterdir()] == ["pepper"]
    assert load_pepper(storage) == found[0]


def test_a_pepper_that_is_no_secret_is_refused(tmp_path) -> None:
    assert load_pepper(tmp_path, "s" * 32) == b"s" * 32
    assert not (tmp_path / "pepper").exists()
    with pytest.raises(StorageError, match="at least 32"):
        load_pepper(tmp_path, "short")
    (tmp_path / "pepper").write_text("cut")
    with pytest.raises(StorageError, match="damaged"):
        load_pepper(tmp_path)


def test_an_expiry_is_a_span_a_day_or_never() -> None:
    assert expiry_of("90d", NOW + 0.5) == NOW + 90 * 86_400
    assert expiry_of("12h", NOW) == NOW + 12 * 3600
    assert expiry_of("never", NOW) is None
    assert expiry_of("2027-01-31", NOW) == 1_801_353_600
    assert expiry_of("2027-01-31T01:00:00+01:00", NOW) == 1_801_353_600
    with pytest.raises(ValueError, match="in the past"):
        expiry_of("2020-01-01", NOW)
    for text in ("", "90", "soon", "-5d", "2027-13-01"):
        with pytest.raises(ValueError, match="no expiry"):
            expiry_of(text, NOW)
