from pathlib import Path

import pytest
import typer

from gateway.commands.storage import Storage, find_storage

PEPPER = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADGATE_PEPPER", raising=False)
    return tmp_path


def refusal(capsys, config: Path | None = None, data: Path | None = None) -> str:
    with pytest.raises(typer.Exit) as ended:
        find_storage(config, data)
    assert ended.value.exit_code == 1
    return capsys.readouterr().err


def test_the_configuration_here_says_where(here):
    (here / "config.yaml").write_text("server: {port: 1}")
    assert find_storage(None, None) == Storage(here / ".headgate")
    (here / "config.yaml").write_text(f"storage: {{directory: data, pepper: {PEPPER}}}")
    assert find_storage(None, None) == Storage(here / "data", PEPPER)


def test_a_relative_directory_counts_from_the_file(here):
    (here / "etc").mkdir()
    (here / "etc" / "h.yaml").write_text("storage: {directory: data}")
    assert find_storage(Path("etc/h.yaml"), None) == Storage(here / "etc" / "data")


def test_a_directory_that_is_named_wins_and_needs_no_configuration(here, monkeypatch):
    (here / "config.yaml").write_text(f"storage: {{directory: data, pepper: {PEPPER}}}")
    assert find_storage(None, Path("other")) == Storage(Path("other"))
    assert find_storage(Path("config.yaml"), Path("other")) == Storage(Path("other"), PEPPER)
    monkeypatch.setenv("HEADGATE_PEPPER", "from-the-environment")
    assert find_storage(None, Path("other")) == Storage(Path("other"), "from-the-environment")


def test_without_either_it_says_what_to_name(capsys):
    assert "name it with --config, or the storage directory with --data" in refusal(capsys)


def test_what_is_wrong_elsewhere_in_the_file_does_not_matter(here):
    (here / "config.yaml").write_text("models: 7\nproviders: {openai: {api_key: '${NOT_SET}'}}\nnonsense: 1")
    assert find_storage(None, None) == Storage(here / ".headgate")


def test_what_is_wrong_with_the_storage_is_told(here, capsys):
    path = here / "config.yaml"
    path.write_text("storage: {directoy: data}")
    assert 'config.yaml:1: storage.directoy: unknown key; did you mean "directory"?' in refusal(capsys)
    path.write_text("storage: {pepper: '${HEADGATE_PEPPER_NOT_SET}'}")
    assert "HEADGATE_PEPPER_NOT_SET is not set" in refusal(capsys)
    path.write_text("storage: {pepper: short}")
    text = refusal(capsys)
    assert "storage.pepper" in text
    assert "short" not in text.replace("shorter", "")
    path.write_text("]")
    assert "not valid YAML" in refusal(capsys)
    assert "there is no such file" in refusal(capsys, here / "none.yaml")


def test_the_pepper_is_not_in_the_repr():
    assert PEPPER not in repr(Storage(Path("x"), PEPPER))
