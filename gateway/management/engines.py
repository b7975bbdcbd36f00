"""The engines' endpoints, without HTTP: what is asked of the supervisor, as bodies in and plain records out.

What cannot be done now is an EngineRefusal with a sentence. Refuses to know how it is done.
"""

from typing import Any, Final, Literal

from pydantic import Field

from gateway.engines import Engines
from gateway.management.keys import Body
from local_engine.processes import StartError
from local_engine.supervisor import SupervisorError

Action = Literal["restart", "scale", "drain", "resume", "sleep", "wake"]
ACTIONS: Final[tuple[Action, ...]] = ("restart", "scale", "drain", "resume", "sleep", "wake")


class EngineRefusal(Exception):  # noqa: N818 - not an error of ours: what was asked for cannot be
    """The message says why."""


class EngineBody(Body):
    """`POST /api/engines/{pool}/{action}`. `replicas` is for `scale`, `surge` for `restart`, `slot` for `drain` and
    `resume` (null: all of the pool)."""

    replicas: int | None = Field(None, ge=0, le=256)
    surge: int | None = Field(None, ge=0, le=64)
    slot: int | None = Field(None, ge=0, le=255)


def listed(engines: Engines) -> dict[str, Any]:
    return {"pools": engines.view()}


def carry_out(engines: Engines, pool: str, action: Action, wanted: EngineBody) -> dict[str, Any]:
    """Begins it; how it goes is in the list."""
    name = pool if wanted.slot is None else f"{pool}/{wanted.slot}"
    if wanted.slot is not None and action not in ("drain", "resume"):
        raise ValueError(f"`{action}` is for a whole pool: leave out the replica.")
    try:
        supervisor = engines.supervisor
        match action:
            case "restart":
                supervisor.restart(pool, wanted.surge)
            case "scale":
                if wanted.replicas is None:
                    raise ValueError("Say how many: `replicas`.")
                supervisor.scale(pool, wanted.replicas)
            case "drain" | "resume":
                supervisor.drain(name, is_drained=action == "drain")
            case "sleep":
                supervisor.sleep(pool)
            case "wake":
                supervisor.wake(pool)
    except (SupervisorError, StartError) as error:
        raise EngineRefusal(str(error)) from error
    return next(view for view in engines.view() if view["pool"] == pool)
