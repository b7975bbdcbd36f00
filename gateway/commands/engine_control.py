"""`headgate engine status|restart|scale|drain|resume|sleep|wake`: engines of the running service, asked of its plane."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from gateway.commands.plane import JsonOption, OperatorOption, Plane, ServiceOption, UrlOption, find_plane
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH

PoolArgument = Annotated[str, typer.Argument(help="A pool with a vllm block.")]
NameArgument = Annotated[str, typer.Argument(help="A pool, or one of its replicas as pool/1.")]
_COLUMNS: Final = (
    Column("Engine"),
    Column("State"),
    Column("For", is_number=True),
    Column("Pid", is_number=True, rank=4),
    Column("Port", is_number=True, rank=5),
    Column("GPUs", rank=6),
    Column("Restarts", is_number=True, rank=3),
    Column("Last failure", folds=True, rank=2),
)


def status(
    url: UrlOption = "",
    key: OperatorOption = "",
    config_path: ServiceOption = DEFAULT_PATH,
    *,
    as_json: JsonOption = False,
) -> None:
    """Every replica: its state, how often it was restarted, why it failed last."""
    told = find_plane(url, key, config_path).ask("/api/engines")
    if as_json:
        print(json.dumps(told, indent=2))
        return
    if not told["pools"]:
        print("No pool has engines that Headgate runs.")
        return
    print_table(_COLUMNS, [_row(replica) for pool in told["pools"] for replica in pool["replicas"]])
    console = Console()
    for pool in told["pools"]:
        console.print(_summary(pool), highlight=False, soft_wrap=True)


def restart(
    pool: PoolArgument,
    surge: Annotated[int | None, typer.Option(help="Additional engines meanwhile.")] = None,
    url: UrlOption = "",
    key: OperatorOption = "",
    config_path: ServiceOption = DEFAULT_PATH,
    *,
    as_json: JsonOption = False,
) -> None:
    """Replace the engines one after another, each drained first; those that were given up are tried again."""
    _act(find_plane(url, key, config_path), pool, "restart", {"surge": surge}, as_json=as_json)


def scale(
    pool: PoolArgument,
    replicas: Annotated[int, typer.Argument(help="How many are to run.")],
    url: UrlOption = "",
    key: OperatorOption = "",
    config_path: ServiceOption = DEFAULT_PATH,
    *,
    as_json: JsonOption = False,
) -> None:
    """Run so many, until the configuration or this says otherwise."""
    _act(find_plane(url, key, config_path), pool, "scale", {"replicas": replicas}, as_json=as_json)


def _simple(action: str, text: str) -> Callable[..., None]:
    """A command that says nothing but whose engines are meant."""

    def command(
        name: NameArgument,
        url: UrlOption = "",
        key: OperatorOption = "",
        config_path: ServiceOption = DEFAULT_PATH,
        *,
        as_json: JsonOption = False,
    ) -> None:
        pool, slot = _slot(name)
        body = {} if slot is None else {"slot": slot}
        _act(find_plane(url, key, config_path), pool, action, body, as_json=as_json)

    command.__name__, command.__doc__ = action, text
    return command


drain = _simple("drain", "Send nothing new to it; it keeps running. `resume` ends that.")
resume = _simple("resume", "What was drained takes requests again.")
sleep = _simple(
    "sleep",
    "Give a pool's GPU memory back, until a request or `wake` comes; engines that cannot sleep end.",
)
wake = _simple("wake", "End the sleep of a pool.")


def _act(plane: Plane, pool: str, action: str, body: dict[str, Any], *, as_json: bool) -> None:
    told = plane.ask(f"/api/engines/{pool}/{action}", "POST", body)
    print(
        json.dumps(told, indent=2)
        if as_json
        else f"{_summary(told)} `headgate engine status` shows how it goes."
    )


def _slot(name: str) -> tuple[str, int | None]:
    pool, slash, slot = name.partition("/")
    if slash and not slot.isdecimal():
        raise typer.BadParameter("a replica is written as pool/1", param_hint="NAME")
    return pool, int(slot) if slash else None


def _row(replica: dict[str, Any]) -> list[str]:
    state = replica["state"].replace("_", " ")
    return [
        replica["name"],
        f"{state} (drained)" if replica["wish"] == "drained" and state == "draining" else state,
        _age(replica["for_s"]),
        "" if replica["pid"] is None else str(replica["pid"]),
        str(replica["port"]),
        ", ".join(map(str, replica["gpus"])) or "CPU",
        str(replica["restarts"]),
        replica["cause"],
    ]


def _summary(pool: dict[str, Any]) -> str:
    text = f"{pool['pool']}: {pool['ready']} of {pool['wanted']} wanted are ready"
    if pool["is_asleep"]:
        text += ", asleep until it is asked for"
    if pool["change"]:
        text += f", a {pool['change']} is under way"
    return f"{text}, {pool['problem']}." if pool["problem"] else f"{text}."


def _age(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
