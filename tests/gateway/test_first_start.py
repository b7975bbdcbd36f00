from pathlib import Path

from gateway.first_start import (
    Addresses,
    FirstKeys,
    command_text,
    keys_text,
    make_first_keys,
    ready_text,
    try_text,
)
from gateway.keys import DeclaredKey, Keyring, Operator, load_pepper
from policies.exchange import Caller

ADDRESSES = Addresses("http://127.0.0.1:8080", "http://127.0.0.1:8081")


def test_the_first_start_makes_an_operator_key_and_a_caller_key_that_are_good(tmp_path):
    pepper = load_pepper(tmp_path)
    keys = make_first_keys(tmp_path, pepper, ())
    ring = Keyring(tmp_path, pepper)
    try:
        assert isinstance(ring.find(keys.caller.encode()), Caller)
        assert isinstance(ring.find_operator(keys.operator.encode()), Operator)
        assert ring.find(keys.operator.encode()) == "unknown"
    finally:
        ring.close()


def test_the_second_start_makes_none(tmp_path):
    pepper = load_pepper(tmp_path)
    assert make_first_keys(tmp_path, pepper, ()) is not None
    assert make_first_keys(tmp_path, pepper, ()) is None


def test_a_kind_that_is_declared_is_not_made(tmp_path):
    pepper = load_pepper(tmp_path)
    keys = make_first_keys(tmp_path, pepper, [DeclaredKey("op", "a-declared-operator-key-1", "operator")])
    assert keys.operator is None
    assert keys.caller is not None


def test_nothing_is_made_where_both_kinds_are_declared(tmp_path):
    declared = [
        DeclaredKey("op", "a-declared-operator-key-1", "operator"),
        DeclaredKey("ci", "a-declared-caller-key-1", "caller"),
    ]
    assert make_first_keys(tmp_path, load_pepper(tmp_path), declared) is None


def test_keys_are_printed_but_never_by_a_repr():
    keys = FirstKeys("op-hg-secret", "sk-hg-secret")
    text = keys_text(keys, Path("/data"))
    assert "op-hg-secret" in text
    assert "sk-hg-secret" in text
    assert "/data" in text
    assert "secret" not in repr(keys)
    assert "operator key" not in keys_text(FirstKeys(None, "sk-hg-secret"), Path("/data"))


def test_the_addresses_say_what_is_served_and_what_is_not():
    text = ready_text(ADDRESSES, [f"m{n}" for n in range(10)], 1, ["models.smart: not served (no key)"])
    assert "http://127.0.0.1:8080/v1   (1 worker)" in text
    assert "m7 and 2 more\n  note          models.smart: not served (no key)\n" in text
    assert "none yet" in ready_text(ADDRESSES, [], 2)


def test_the_lines_to_paste_have_the_key_the_model_and_the_real_port(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = try_text("sk-hg-x", ADDRESSES, "demo", Path("config.yaml"))
    assert 'curl http://127.0.0.1:8080/v1/chat/completions -H "Authorization: Bearer sk-hg-x"' in text
    assert 'OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="sk-hg-x")' in text
    assert text.rstrip().endswith(" costs")
    elsewhere = try_text("sk-hg-x", ADDRESSES, "demo", Path("/a b/h.yaml"))
    assert elsewhere.rstrip().endswith("costs --config '/a b/h.yaml'")


def installed(directory: Path, *, has_script: bool, monkeypatch) -> Path:
    binaries = directory / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "headgate")[: 1 + has_script]:
        (binaries / name).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(binaries / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    return binaries


def test_commands_are_named_as_they_work_from_here(monkeypatch, tmp_path):
    binaries = installed(tmp_path / "a", has_script=True, monkeypatch=monkeypatch)
    monkeypatch.chdir(tmp_path / "a")
    assert command_text() == ".venv/bin/headgate"
    monkeypatch.chdir(tmp_path)
    assert command_text() == "a/.venv/bin/headgate"
    monkeypatch.chdir("/")
    assert command_text() == str(binaries / "headgate").lstrip("/")
    monkeypatch.chdir(binaries)
    monkeypatch.setenv("PATH", str(binaries))
    assert command_text() == "headgate"


def test_another_headgate_on_the_path_is_not_taken_for_this_one(monkeypatch, tmp_path):
    other = installed(tmp_path / "other", has_script=True, monkeypatch=monkeypatch)
    installed(tmp_path / "a", has_script=True, monkeypatch=monkeypatch)
    monkeypatch.setenv("PATH", str(other))
    monkeypatch.chdir(tmp_path / "a")
    assert command_text() == ".venv/bin/headgate"


def test_without_an_installed_command_the_module_is_named(monkeypatch, tmp_path):
    installed(tmp_path, has_script=False, monkeypatch=monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert command_text() == ".venv/bin/python -m gateway"
