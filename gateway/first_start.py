"""What a newcomer sees: the first keys, made once, and lines to paste that work; later starts print addresses only.

Owns the texts on standard output. Keys are printed by the start that made them and by no other: only their
hashes are kept.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from gateway.config import DEFAULT_PATH
from gateway.keys import DeclaredKey, NewKey, create_key
from gateway.stores import key_table
from gateway.stores.key_table import KeyKind
from gateway.stores.sqlite import DATABASE_NAME, database

_KINDS: Final[tuple[KeyKind, ...]] = ("operator", "caller")


class FirstKeys(NamedTuple):
    """The keys themselves; gone when the process ends. None: not made, because the configuration declares some."""

    operator: str | None
    caller: str | None

    def __repr__(self) -> str:
        return "FirstKeys(...)"


class Addresses(NamedTuple):
    """Base URLs without a trailing slash."""

    data_plane: str
    management: str


def make_first_keys(storage: Path, pepper: bytes, declared: Iterable[DeclaredKey]) -> FirstKeys | None:
    """An operator key and a caller key in a storage without keys, of each kind that is not declared.

    None when there is nothing to make.
    """
    kinds = {key.kind for key in declared}
    with database(storage / DATABASE_NAME) as connection, connection:  # the second: both keys or none
        if key_table.latest_revision(connection) or len(kinds) == 2:
            return None
        made: dict[KeyKind, str] = {}
        for kind in _KINDS:
            if kind not in kinds:
                made[kind], _ = create_key(
                    connection, pepper, NewKey(f"first {kind}", kind), int(time.time())
                )
    return FirstKeys(made.get("operator"), made.get("caller"))


def command_text() -> str:
    """How this installation is called from the directory we are in."""
    python = Path(sys.executable)
    script = python.with_name("headgate")
    if not script.exists():
        return f"{_from_here(python)} -m gateway"
    found = shutil.which("headgate")
    return "headgate" if found is not None and script.samefile(found) else _from_here(script)


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def ready_text(addresses: Addresses, models: list[str], workers: int, notes: Iterable[str] = ()) -> str:
    """`notes`: what is off, and why."""
    shown = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    return f"""
Headgate is ready.

  data plane    {addresses.data_plane}/v1   ({workers} worker{"s" * (workers != 1)})
  management    {addresses.management}
  models        {shown or "none yet: set a provider's key, or add a pool to the configuration"}
{"".join(f"  note          {note}{chr(10)}" for note in notes)}"""


def keys_text(keys: FirstKeys, storage: Path) -> str:
    uses = (("caller", keys.caller, "for clients"), ("operator", keys.operator, "for the management plane"))
    lines = [f"  {kind + ' key':<12}  {key}   ({use})" for kind, key, use in uses if key]
    return f"""
First start. These keys were made for it and are shown this once:

{chr(10).join(lines)}

Keys and costs are kept in {storage}. More keys: {command_text()} keys create NAME
"""


def try_text(caller_key: str, addresses: Addresses, model: str, config: Path) -> str:
    """A curl line, three lines of Python and the way to see the costs, made to be pasted."""
    costs = f"{command_text()} costs"
    if config.absolute() != DEFAULT_PATH.absolute():
        costs += f" --config {shlex.quote(str(config))}"
    return f"""
Try it:

curl {addresses.data_plane}/v1/chat/completions -H "Authorization: Bearer {caller_key}" -H "Content-Type: application/json" -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

or in Python (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{addresses.data_plane}/v1", api_key="{caller_key}")
print(client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "Hello!"}}]).choices[0].message.content)

What it cost:

{costs}
"""
