"""The documents: what they link to and name is there, and what is there is named."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from gateway.commands.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench/README.md"])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
SOURCE = re.compile(r"(?:gateway|policies|backends|local_engine|tests|bench|deploy|docs)/[\w./-]*\w")
DECISION_LINES = 40


def commands(group: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in getattr(group, "commands", {}).items():
        yield (*path, name)
        yield from commands(command, (*path, name))


COMMANDS = set(commands(typer.main.get_command(app)))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    for code in CODE.findall(page.read_text()):
        for path in SOURCE.findall(code.strip("`")):
            named = ROOT / path
            is_made_up = re.search(r"[A-Z]{4}|acme|RESULTS|build", path)
            assert is_made_up or named.exists() or named.with_suffix(".py").exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_named_exist(page: Path) -> None:
    groups = {command[0] for command in COMMANDS if len(command) == 2}
    for code in CODE.findall(page.read_text().replace("\\|", "|")):
        for command, rest in re.findall(r"headgate ([a-z]+)(?: ([a-z|]+))?", code):
            assert (command,) in COMMANDS, f"{page.name}: headgate {command}"
            for name in rest.split("|") if rest and command in groups else ():
                assert (command, name) in COMMANDS, f"{page.name}: headgate {command} {name}"


@pytest.mark.parametrize("command", sorted(COMMANDS), ids=" ".join)
def test_every_command_is_in_the_readme(command: tuple[str, ...]) -> None:
    readme = (ROOT / "README.md").read_text().replace("\\|", "|")
    found = re.findall(rf"headgate {command[0]}((?: [a-z|]+)?)", readme)
    assert found, f"headgate {command[0]} is not in the README"
    if len(command) == 2:
        assert any(command[1] in rest.strip().split("|") for rest in found), " ".join(command)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/decisions/*.md")), ids=lambda page: page.name)
def test_decision_records_are_short_and_whole(page: Path) -> None:
    text = page.read_text()
    assert len(text.splitlines()) < DECISION_LINES
    assert text.startswith(f"# {page.name[:4]}: ")
    for part in ("Context", "Decision", "Cost", "How we would notice that it was wrong"):
        assert f"**{part}.**" in text, part


def test_decision_records_are_numbered_through() -> None:
    numbers = [int(page.name[:4]) for page in sorted(ROOT.glob("docs/decisions/*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
