"""`headgate jobs`: what is in the queue, and how full it is. Asks the running service.

Shows whose a job is and what became of it, never what was asked or answered.
"""

import json
from typing import Annotated, Any, Final
from urllib.parse import quote, urlencode

import typer

from gateway.commands.plane import OperatorOption, ServiceOption, UrlOption, find_plane
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH

app = typer.Typer(help="Jobs of the queue.", no_args_is_help=True)

_JOBS: Final = (
    Column("id"),
    Column("tenant", folds=True),
    Column("lane", folds=True),
    Column("class", rank=3),
    Column("door", rank=4),
    Column("status"),
    Column("age", is_number=True),
    Column("attempts", is_number=True, rank=2),
    Column("code", is_number=True, rank=5),
    Column("error", folds=True, rank=1),
)
_LANES: Final = (
    Column("lane", folds=True),
    Column("queued", is_number=True),
    Column("flex", is_number=True, rank=3),
    Column("batch", is_number=True, rank=3),
    Column("delayed", is_number=True, rank=2),
    Column("running", is_number=True),
    Column("tenants", is_number=True, rank=1),
    Column("oldest", is_number=True),
    Column("per second", is_number=True),
)
_MINUTE_S, _HOUR_S = 60, 3600

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Its id, job_...")]


@app.command("list")
def list_jobs(
    state: Annotated[str, typer.Option(help="queued, running, succeeded, failed, dead, ...")] = "",
    tenant: Annotated[str, typer.Option(help="Only this one's.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest so many.")] = 50,
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """The newest jobs."""
    query = urlencode({"state": state, "tenant": tenant, "limit": limit})
    found = find_plane(url, key, config).ask(f"/api/jobs?{query}")
    if as_json:
        print(json.dumps(found))
        return
    print_table(_JOBS, [_row(job) for job in found["jobs"]])
    if found["next"] is not None:
        print(f"There are more: --limit, or `after={found['next']}` on the management plane.")


@app.command()
def show(
    job: JobArgument,
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """One job, with its history."""
    _say(find_plane(url, key, config).ask(f"/api/jobs/{quote(job, safe='')}"), as_json=as_json)


@app.command()
def cancel(
    job: JobArgument,
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Cancel a job: free while it waits; of one that runs what it used is billed."""
    _say(find_plane(url, key, config).ask(f"/api/jobs/{quote(job, safe='')}/cancel", "POST"), as_json=as_json)


@app.command()
def replay(
    job: JobArgument,
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Hand a dead job's request in again, as a new job."""
    _say(find_plane(url, key, config).ask(f"/api/jobs/{quote(job, safe='')}/replay", "POST"), as_json=as_json)


@app.command()
def drain(
    resume: Annotated[bool, typer.Option("--resume", help="Draw again.")] = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Draw no more jobs on this node; what runs goes on, and new ones are taken in. Until --resume or a restart."""
    told = find_plane(url, key, config).ask("/api/jobs/drain", "DELETE" if resume else "POST")
    print(
        "Jobs are drawn."
        if told["is_drawing"]
        else "No more jobs are drawn; `headgate jobs stats` shows what still runs."
    )


@app.command()
def stats(
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """How full the queue is, lane by lane."""
    found = find_plane(url, key, config).ask("/api/jobs/stats")
    if as_json:
        print(json.dumps(found))
        return
    print_table(_LANES, [_lane(lane) for lane in found["lanes"]])
    states = ", ".join(f"{count} {state}" for state, count in sorted(found["states"].items()))
    print(f"Jobs: {states or 'none'}.")
    outbox = found["outbox"]
    print(f"Webhooks: {outbox['due']} due, {outbox['waiting']} waiting, {outbox['given_up']} given up.")
    if not found["is_drawing"]:
        print("No jobs are drawn on this node: `headgate jobs drain --resume`.")


def _row(job: dict[str, Any]) -> list[str]:
    error = job["error"]
    return [
        job["id"],
        job["tenant"],
        job["lane"],
        job["class"],
        job["door"],
        job["status"],
        _span(job["age_s"]),
        str(job["attempts"]),
        _cell(job["status_code"]),
        "" if error is None else error["message"],
    ]


def _lane(lane: dict[str, Any]) -> list[str]:
    figures = ("queued", "flex", "batch", "delayed", "running", "tenants")
    return [
        lane["lane"],
        *(str(lane[name]) for name in figures),
        _span(lane["oldest_s"]),
        f"{lane['per_s']:.2f}",
    ]


def _span(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / _MINUTE_S:.0f} min" if seconds < _HOUR_S else f"{seconds / _HOUR_S:.1f} h"


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def _say(job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(job))
        return
    for name, value in job.items():
        if name == "history":
            print("history")
            for line in value:
                print(f"  {line}")
        elif value not in (None, ""):
            print(f"{name:<12}  {value['message'] if isinstance(value, dict) else value}")
