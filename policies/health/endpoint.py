"""The health of one endpoint, as one process knows it: up, out, or warming up after it was out.

Owns the transitions and their times. Refuses to know its pool, requests and probes' contents. Invariants: an attempt
ends once; what was sent before an endpoint went out, or before it came back, says nothing about it afterwards; being
refused for load or by the caller's fault never takes it out.
"""

from collections.abc import Callable
from typing import Final, Literal

from backends.errors import NOTHING_SENT
from backends.load import EndpointLoad
from policies.health.settings import HealthSettings

State = Literal["up", "out", "warming"]

# An endpoint that was whole for so long has its earlier ejections forgiven.
FORGIVEN_S: Final = 60.0
# Nobody has told of a probe for so long: a live request must be the trial.
PROBE_SILENCE_S: Final = 15.0
# Failed looks in a row at one that nothing else is said of.
BAD_LOOKS: Final = 3
# Processes that took it out together have it back together, but for the time a word takes.
_AGREEMENT_S: Final = 1.0
# Share of its traffic with which an endpoint begins to warm up.
FIRST_SHARE: Final = 0.1
# Answers in a row that take far longer than the others' would: many, because some prompts just are longer.
SLOW_ANSWERS: Final = 5
# Samples before an endpoint's pace is compared with, and the weight of each later one.
MIN_SAMPLES: Final = 10
_SMOOTHING: Final = 0.1
_STALLED: Final = "stalled"


class EndpointHealth:
    """Writes `health` of its EndpointLoad; tells `on_change` of every change of state, in this process's view.

    `reason` is why it went out: an ErrorKind, a status, `slow`, `stalled`, `probe`.
    """

    __slots__ = (
        "_bad_looks",
        "_on_change",
        "_probe_heard_at",
        "_slow",
        "back_at",
        "cool_until_at",
        "due_at",
        "ejections",
        "endpoint",
        "failures",
        "first_byte_s",
        "is_on_trial",
        "out_at",
        "pace",
        "reason",
        "samples",
        "settings",
        "silent_since_at",
        "slow_pace",
        "state",
        "waiting",
        "whole_at",
    )

    def __init__(
        self,
        endpoint: EndpointLoad,
        settings: HealthSettings,
        on_change: Callable[["EndpointHealth"], None],
    ) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self._on_change = on_change
        self.state: State = "up"
        self.reason = ""
        self.failures = 0  # in a row
        self.ejections = 0  # since it was last whole for long
        self.out_at = 0.0
        self.due_at = 0.0  # from here on it may be tried
        self.back_at = 0.0
        self.whole_at = 0.0
        self.cool_until_at = 0.0
        self.is_on_trial = False
        self._probe_heard_at = 0.0
        self._bad_looks = 0  # in a row
        # What its pool compares.
        self.waiting = 0  # attempts without a first byte
        self.silent_since_at = 0.0
        self.first_byte_s = 0.0  # usual wait
        self.pace = 0.0  # usual seconds per unit of work
        self.samples = 0
        self.slow_pace = 0.0  # as the pool's others say; 0: not known
        self._slow = 0

    def attempt(self, now: float, work: float) -> "Attempt":
        """One is sent now. `work` is how much the engine has before it and to do for it, in prompt tokens."""
        if not self.waiting:
            self.silent_since_at = now
        self.waiting += 1
        if self.state == "out" and now >= self.due_at:
            self.is_on_trial = True
        return Attempt(self, now, work)

    def may_try(self, now: float) -> bool:
        """Whether, being out, it may get one live request now."""
        if self.is_on_trial or now < self.due_at:
            return False
        return not self.settings.has_probe or now - self._probe_heard_at > PROBE_SILENCE_S

    def cool(self, now: float, for_s: float) -> None:
        """It asked for a pause (429, `retry-after`): not chosen while there is another, and nothing else."""
        if not self.settings.failures:
            return
        self.cool_until_at = max(self.cool_until_at, now + for_s)
        self._on_change(self)

    def probed(self, now: float, reason: str, *, is_trial: bool) -> None:
        """What came of looking at it; `reason` is empty when all is well. A trial is more than a look: it generates."""
        if self.state == "out":
            if is_trial:
                self._probe_heard_at = now
                if not reason and now >= self.due_at:
                    self._come_back(now)
        elif not reason:
            self._bad_looks = 0
        else:
            self._bad_looks += BAD_LOOKS if reason in NOTHING_SENT else 1
            if self._bad_looks >= BAD_LOOKS:
                self.eject(now, reason)

    def hear_out(self, now: float, reason: str, for_s: float) -> None:
        """Another process took it out: it is believed."""
        if self.state != "out" and self.settings.failures:
            self._leave(now, reason, for_s)

    def hear_back(self, now: float) -> None:
        """Another process saw it answer."""
        if self.state == "out" and now >= self.due_at - _AGREEMENT_S:
            self._come_back(now)

    def start_anew(self, now: float) -> None:
        """Whoever runs it says that it is another process now, and generates: what the one before did is its own."""
        self.ejections = 0
        if self.state == "out":
            self._come_back(now)

    def refresh(self, now: float) -> None:
        """What time alone changes: the share while warming up, the end of a pause."""
        if self.state == "warming":
            self._warm(now)
        if self.cool_until_at and now >= self.cool_until_at:
            self.cool_until_at = 0.0
            self._on_change(self)

    def eject(self, now: float, reason: str) -> None:
        settings = self.settings
        if not settings.failures:
            return
        if self.state == "up" and now - self.whole_at > FORGIVEN_S:
            self.ejections = 0
        for_s = min(settings.eject_s * 2.0**self.ejections, settings.eject_max_s)
        self.ejections += 1
        self._leave(now, reason, for_s)

    # For attempts.

    def hear(self, now: float) -> None:
        self.waiting -= 1
        self.silent_since_at = now
        if self.state == "out" and self.reason == _STALLED:
            self._come_back(now)

    def succeed(self, now: float, sent_at: float, first_byte_s: float, pace: float) -> None:
        """A whole answer. Its pace is judged, and remembered for the others to be judged by."""
        if self.slow_pace and pace > self.slow_pace:
            self._slow += 1
            if self.state == "out":
                if self.is_on_trial and sent_at >= self.due_at:
                    self.eject(now, "slow")
                return
            if self._slow >= SLOW_ANSWERS and sent_at >= self.back_at:
                self.eject(now, "slow")
                return
        else:
            self._slow = 0
        if self.state == "out":
            if sent_at >= self.out_at:
                self._come_back(now)
            return
        self.failures = 0
        self.samples += 1
        weight = _SMOOTHING if self.samples * _SMOOTHING >= 1.0 else 1.0 / self.samples
        self.pace += weight * (pace - self.pace)
        self.first_byte_s += weight * (first_byte_s - self.first_byte_s)

    def fail(self, now: float, sent_at: float, kind: str) -> None:
        if self.state == "out":
            if self.is_on_trial and sent_at >= self.due_at:
                self.eject(now, kind)
        elif sent_at >= self.back_at:
            self._count_failure(now, kind)

    def forsake(self, sent_at: float) -> None:
        """An attempt ended without saying anything about the endpoint."""
        if sent_at >= self.due_at:
            self.is_on_trial = False

    def _count_failure(self, now: float, kind: str) -> None:
        limit = self.settings.failures
        if self.state == "warming":
            limit = min(limit, 2)  # it has just been out: less is believed of it
        self.failures += limit if kind in NOTHING_SENT else 1
        if self.failures >= limit:
            self.eject(now, kind)

    def _leave(self, now: float, reason: str, for_s: float) -> None:
        self.state = "out"
        self.reason = reason
        self.out_at = now
        self.due_at = now + for_s
        self.is_on_trial = False
        self.failures = self._slow = self._bad_looks = 0
        self.endpoint.health = 0.0
        self._on_change(self)

    def _come_back(self, now: float) -> None:
        self.state = "warming"
        self.back_at = now
        self.is_on_trial = False
        self.failures = self._slow = 0
        self._warm(now)
        if self.state == "warming":
            self._on_change(self)

    def _warm(self, now: float) -> None:
        over_s = self.settings.slow_start_s
        share = (now - self.back_at) / over_s if over_s > 0 else 1.0
        self.endpoint.health = min(1.0, FIRST_SHARE + (1 - FIRST_SHARE) * share)
        if share >= 1.0:
            self.state, self.reason, self.whole_at = "up", "", now
            self._on_change(self)


class Attempt:
    """One request at one endpoint, from dispatch to its end; each of the endings counts once, the first."""

    __slots__ = ("_first_byte_s", "_health", "_is_heard", "_sent_at", "_work")

    def __init__(self, health: EndpointHealth, now: float, work: float) -> None:
        self._health: EndpointHealth | None = health
        self._sent_at = now
        self._work = work
        self._is_heard = False
        self._first_byte_s = 0.0

    def heard(self, now: float) -> None:
        """The first byte of an answer is there, whatever it says."""
        health = self._health
        if health is not None and not self._is_heard:
            self._is_heard = True
            self._first_byte_s = now - self._sent_at
            health.hear(now)

    def add_work(self, tokens: float) -> None:
        """Before `heard`'s wait is judged: it was spent on this, too."""
        self._work += tokens

    def succeeded(self, now: float) -> None:
        health = self._end()
        if health is not None:
            wait_s = self._first_byte_s
            health.succeed(now, self._sent_at, wait_s, wait_s / self._work)

    def failed(self, now: float, kind: str) -> None:
        """`kind` is an ErrorKind or the status of a server's error."""
        health = self._end()
        if health is not None:
            health.fail(now, self._sent_at, kind)

    def abandoned(self) -> None:
        """The client went, or the answer was the client's own fault or for load: nothing is learned."""
        health = self._end()
        if health is not None:
            health.forsake(self._sent_at)

    def _end(self) -> EndpointHealth | None:
        health = self._health
        if health is not None:
            self._health = None
            if not self._is_heard:
                health.waiting -= 1
        return health
