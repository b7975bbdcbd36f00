"""`headgate batch`: a file of requests through the queue, with its progress; and what became of others.

Speaks to the data plane as any client would (docs/queue.md). Tables for people, `--json` for programs; results go to
files or to standard output, everything else to standard error while they do.
"""

import json
import secrets
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gateway.commands.data_plane import KeyOption, UrlOption, find_data_plane, pieces_of, send_form
from gateway.commands.plane import Plane, ServiceOption
from gateway.commands.storage import fail
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH

app = typer.Typer(no_args_is_help=True, help="Files of requests, run when there is room.")

FINAL: Final = frozenset({"completed", "failed", "expired", "cancelled"})
_POLL_S: Final = 1.0
_PIECE_BYTES: Final = 256 * 1024
_ERRORS_SHOWN: Final = 20
_COLUMNS: Final = (
    Column("Batch"),
    Column("Status"),
    Column("Done", is_number=True),
    Column("Failed", is_number=True, rank=3),
    Column("Total", is_number=True, rank=2),
    Column("Model", rank=4),
    Column("Created", rank=5),
)

BatchArgument = Annotated[str, typer.Argument(help="Its id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
FolderOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the output and error files; default: beside the input."),
]


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="JSON lines: custom_id, method, url, body.")],
    window: Annotated[str, typer.Option(help="By when: from 1m to 7d.")] = "24h",
    output: FolderOption = None,
    url: UrlOption = "",
    key: KeyOption = "",
    config: ServiceOption = DEFAULT_PATH,
    *,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show its progress, then download what it brings.")
    ] = True,
) -> None:
    """Uploads a file, starts its batch, and waits for the answers."""
    plane = find_data_plane(url, key, config)
    endpoint = _endpoint_in(file)
    console = Console(stderr=True)
    uploaded = _upload(plane, file, console)
    batch = plane.ask(
        "/v1/batches",
        "POST",
        {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": window},
    )
    if not wait:
        print(batch["id"])
        return
    console.print(f"Batch {batch['id']}: it goes on if you leave.", highlight=False)
    batch = _follow(plane, batch, console)
    _tell_errors(batch, console)
    for path in _download(plane, batch, output or file.parent, file.stem):
        print(path)
    if batch["status"] != "completed" or batch["request_counts"]["failed"]:
        raise typer.Exit(1)


@app.command("list")
def list_all(
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many, the newest first.")] = 20,
    url: UrlOption = "",
    key: KeyOption = "",
    config: ServiceOption = DEFAULT_PATH,
    *,
    as_json: JsonOption = False,
) -> None:
    """The latest batches of this key's tenant."""
    found = find_data_plane(url, key, config).ask(f"/v1/batches?limit={limit}")["data"]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print_table(_COLUMNS, [_row(batch) for batch in found])


@app.command()
def show(
    batch_id: BatchArgument,
    url: UrlOption = "",
    key: KeyOption = "",
    config: ServiceOption = DEFAULT_PATH,
    *,
    as_json: JsonOption = False,
) -> None:
    """One batch, and why it failed if it did."""
    batch = find_data_plane(url, key, config).ask(f"/v1/batches/{batch_id}")
    if as_json:
        print(json.dumps(batch, indent=2))
        return
    print_table(_COLUMNS, [_row(batch)])
    _tell_errors(batch, Console())


@app.command()
def cancel(
    batch_id: BatchArgument, url: UrlOption = "", key: KeyOption = "", config: ServiceOption = DEFAULT_PATH
) -> None:
    """Cancels what has not been answered yet; what has been is kept."""
    batch = find_data_plane(url, key, config).ask(f"/v1/batches/{batch_id}/cancel", "POST")
    print(f"{batch['id']}: {batch['status']}")


@app.command()
def download(
    batch_id: BatchArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the output and error files.")
    ] = Path(),
    url: UrlOption = "",
    key: KeyOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """The output and error files of a batch that has ended."""
    plane = find_data_plane(url, key, config)
    batch = plane.ask(f"/v1/batches/{batch_id}")
    if batch["status"] not in FINAL:
        fail(f"{batch_id} has the status {batch['status']}: there are no files yet.")
    paths = _download(plane, batch, output, batch_id)
    if not paths:
        fail(f"{batch_id} has the status {batch['status']}, and brought no files.")
    for path in paths:
        print(path)


def _endpoint_in(file: Path) -> str:
    """Where the first line is to be posted: all of a batch's lines go there."""
    try:
        with file.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        return str(json.loads(first)["url"])
    except OSError as error:
        fail(f"Cannot read {file}: {error.strerror}.")
    except (ValueError, KeyError, TypeError):
        fail(f"The first line of {file} is not a request of a batch: custom_id, method, url, body.")


def _upload(plane: Plane, file: Path, console: Console) -> Any:
    """As a form that is made while it is sent."""
    boundary = secrets.token_hex(16)
    name = file.name.replace('"', "%22")
    head = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    ).encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    size_bytes = file.stat().st_size
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"Sending {file.name}", total=size_bytes)

        def pieces() -> Iterator[bytes]:
            yield head
            with file.open("rb") as content:
                while piece := content.read(_PIECE_BYTES):
                    progress.advance(task, len(piece))
                    yield piece
            yield tail

        total_bytes = len(head) + size_bytes + len(tail)
        return send_form(
            plane, "/v1/files", f"multipart/form-data; boundary={boundary}", pieces(), total_bytes
        )


def _follow(plane: Plane, batch: dict[str, Any], console: Console) -> dict[str, Any]:
    """Until it has ended, with a bar of its lines and the time they will take."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(batch["status"], total=None)
        while True:
            counts = batch["request_counts"]
            done = counts["completed"] + counts["failed"]
            is_running = batch["status"] not in {"validating", "failed"}
            progress.update(
                task,
                description=batch["status"],
                total=counts["total"] if is_running else None,
                completed=done,
            )
            if batch["status"] in FINAL:
                return batch
            time.sleep(_POLL_S)
            batch = plane.ask(f"/v1/batches/{batch['id']}")


def _download(plane: Plane, batch: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """The paths that were written. A file appears when all of it is there."""
    written = []
    for name in ("output", "error"):
        file_id = batch[f"{name}_file_id"]
        if file_id is None:
            continue
        path = folder / f"{stem}.{name}.jsonl"
        part = path.with_suffix(".part")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as content:
                for piece in pieces_of(plane, f"/v1/files/{file_id}/content"):
                    content.write(piece)
            part.replace(path)
        except OSError as error:
            fail(f"Cannot write {path}: {error.strerror}.")
        written.append(path)
    return written


def _tell_errors(batch: dict[str, Any], console: Console) -> None:
    errors = (batch["errors"] or {}).get("data", [])
    for error in errors[:_ERRORS_SHOWN]:
        place = "" if error["line"] is None else f"line {error['line']}: "
        console.print(
            f"{place}{error['message']} ({error['code']})", highlight=False, soft_wrap=True, markup=False
        )
    if len(errors) > _ERRORS_SHOWN:
        console.print(f"... and {len(errors) - _ERRORS_SHOWN} more.", highlight=False)


def _row(batch: dict[str, Any]) -> list[str]:
    counts = batch["request_counts"]
    created = datetime.fromtimestamp(batch["created_at"]).astimezone()
    return [
        batch["id"],
        batch["status"],
        str(counts["completed"]),
        str(counts["failed"]),
        str(counts["total"]),
        batch["model"] or "",
        f"{created:%Y-%m-%d %H:%M}",
    ]
