"""Everything one holder (a worker) has of limits, and its conversation with the store.

`compose` makes the next update out of what happened since the last, `take_in` applies the answer. One update is under
way at a time; until it is answered it is repeated as it is. Pure: the sending is `gateway.leases`.
"""

from collections.abc import Callable
from typing import Final

from policies.limits.account import Account
from policies.limits.limit import Limit, counter_key
from policies.limits.messages import Counter, Refusal, Reply, Update

Reservation = tuple[Account, int]  # units
Group = tuple[Reservation, ...]
Outcome = tuple[Account, int, Refusal] | None  # who had no room for how much, and why; None: granted

_IDLE_S: Final = 60.0  # after which an account that holds nothing is forgotten
MAX_GROUPS: Final = 256  # in one update


class _Draft:
    """The lines of an update being composed, and who they are about."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []
        self._places: dict[str, int] = {}
        self.counters: list[Counter] = []
        self.posts: list[tuple[int, int, int]] = []
        self.releases: list[tuple[int, int]] = []
        self.claims: list[tuple[int, int]] = []
        self.wants: list[tuple[int, int]] = []

    def index(self, account: Account) -> int:
        counter = account.counter
        index = self._places.get(counter.key)
        if index is None:
            index = self._places[counter.key] = len(self.counters)
            self.counters.append(counter)
            self.accounts.append(account)
        return index


class Holding:
    """The accounts of one worker. `name` is new for every holder that ever was."""

    def __init__(
        self, name: Callable[[], str], *, over_admission: float = 0.01, ttl_us: int = 10_000_000
    ) -> None:
        self._name = name
        self.over_admission = over_admission
        self._ttl_us = ttl_us
        self.holder = name()
        self._number = 0
        self.holders = 1
        self.accounts: dict[str, Account] = {}
        self._touched: list[Account] = []
        self._sent: Update | None = None
        self.mentioned: list[Account] = []  # by the latest update, in the order of its counters
        self._groups: list[Group] = []
        self.granted: list[Group] = []  # what the latest answer was about, granted or not
        self.forgotten = 0  # times the store did not know us
        self.generation = 0  # changes when accounts were dropped: who keeps one must ask again
        self.valid_until = 0.0  # monotonic: until then the store keeps what we hold
        self._offset_us = 0  # the store's time less the monotonic one

    def account(self, limit: Limit, member: str, now_us: int) -> Account:
        """The account of this limit's member, made when it is first asked for."""
        key = counter_key(limit.scope.level, member, limit.name)
        account = self.accounts.get(key)
        if account is None:
            account = self.accounts[key] = Account(limit, member, now_us)
            account.used_at = (now_us - self._offset_us) / 1e6
        elif account.limit is not limit and account.limit != limit:
            account.change(limit, now_us)
        return account

    def now_us(self, now_at: float) -> int:
        """The store's time, as far as is known."""
        return int(now_at * 1e6) + self._offset_us

    def set_time(self, now_us: int, now_at: float) -> None:
        self._offset_us = now_us - int(now_at * 1e6)

    def touch(self, account: Account) -> None:
        """The next update has something to say about it."""
        if not account.is_touched:
            account.is_touched = True
            self._touched.append(account)

    def compose(self, groups: list[Group], now_at: float, *, is_last: bool = False) -> Update:
        """The next update. `groups` (at most MAX_GROUPS) wait for its answer; posts and gifts back go with it."""
        assert self._sent is None
        draft = _Draft()
        now_us = self.now_us(now_at)
        touched, self._touched = self._touched, []
        for account in touched:
            account.is_touched = False
            self._refresh(account, now_us)
            self._state(draft, account, now_at, is_last=is_last)
        lines = []
        for group in groups:
            for account, _ in group:
                self._refresh(account, now_us)
            lines.append(tuple((draft.index(account), units) for account, units in group))
        self._number += 1
        self._groups = groups
        self.mentioned = draft.accounts
        self._sent = Update(
            holder=self.holder,
            number=self._number,
            ttl_us=self._ttl_us,
            counters=tuple(draft.counters),
            posts=tuple(draft.posts),
            releases=tuple(draft.releases),
            claims=tuple(draft.claims),
            groups=tuple(lines),
            wants=tuple(draft.wants),
            is_last=is_last,
        )
        return self._sent

    def take_in(self, reply: Reply, sent_at: float) -> list[Outcome] | None:
        """The answer to the update: what became of each group; granted units are committed now.

        None in place of the list: the store does not know this holder; `sent` is now what to send instead.
        `sent_at` is when the update, or its latest repetition, went out.
        """
        update = self._sent
        assert update is not None
        if not reply.is_known:
            self._begin_again(update, posts=() if reply.was_applied else update.posts)
            return None
        self._sent = None
        self.valid_until = sent_at + self._ttl_us / 1e6
        self.holders = max(1, reply.holders)
        accounts = self.mentioned
        outcomes: list[Outcome] = []
        for group, refusal in zip(self._groups, reply.refusals, strict=True):
            if refusal is None:
                outcomes.append(None)
                for account, units in group:
                    account.held += units
            else:
                refusing = accounts[refusal.counter]
                units = next(units for account, units in group if account is refusing)
                outcomes.append((refusing, units, refusal))
        for (index, _), units in zip(update.wants, reply.granted, strict=True):
            accounts[index].held += units
            accounts[index].free += units
        for account, reading in zip(accounts, reply.readings, strict=True):
            account.reading = reading
        self.granted, self._groups = self._groups, []
        return outcomes

    @property
    def sent(self) -> Update | None:
        """The update that waits for its answer."""
        return self._sent

    @property
    def is_quiet(self) -> bool:
        """Nothing to say but that we live."""
        return not self._touched

    def tell_all(self) -> None:
        """The next update mentions every account that has anything: for readings, slack that is not needed, and the end."""
        for account in self.accounts.values():
            if not account.is_idle or account.slack:
                self.touch(account)

    def forget_idle(self, now_at: float) -> bool:
        """Drops accounts that hold nothing and were not used lately. True when some were."""
        if self._sent is not None:
            return False
        for account in self.accounts.values():
            if account.asked:  # if only to be refused
                account.used_at = now_at
        idle = [
            key
            for key, account in self.accounts.items()
            if account.is_idle and not account.is_touched and now_at - account.used_at > _IDLE_S
        ]
        for key in idle:
            del self.accounts[key]
        self.generation += bool(idle)
        return bool(idle)

    def _refresh(self, account: Account, now_us: int) -> None:
        counter = account.counter
        if counter.kind == "period" and now_us >= counter.periods[1]:
            account.counter = account.limit.counter(account.member, now_us)

    def _state(self, draft: _Draft, account: Account, now_at: float, *, is_last: bool) -> None:
        """Brings what the store knows of this account up to what is so, and its slack to what it should be."""
        index = draft.index(account)
        posted = account.unposted_units
        if posted or account.unposted:
            draft.posts.extend((index, at_us, units) for at_us, units in account.unposted.items())
            account.unposted.clear()
        account.plan_slack(now_at, self.holders, self.over_admission)
        slack = 0 if is_last else account.slack
        if account.is_rate:
            account.held = account.free
        committed = 0 if account.is_rate else account.held - posted - account.free
        covered = account.held - min(
            max(account.held, 0), posted
        )  # what is left when spent is no longer held
        release = account.held - covered + max(0, covered - max(committed, 0) - slack)
        claim = max(0, committed - (account.held - release))
        held = account.held - release + claim
        if release:
            draft.releases.append((index, release))
        if claim:
            draft.claims.append((index, claim))
        want = committed + slack - held
        if want > 0:
            draft.wants.append((index, want))
        account.held = held
        account.unposted_units = 0
        account.free = held - committed

    def _begin_again(self, lost: Update, posts: tuple[tuple[int, int, int], ...]) -> None:
        """The same under another name: posts and groups again, and claims for what requests under way have."""
        self.forgotten += 1
        self.holder, self._number = self._name(), 1
        draft = _Draft()
        for account in self.mentioned:
            draft.index(account)
        self.mentioned = draft.accounts
        for account in self.accounts.values():
            # Slack is gone, and what was spent meanwhile is posted by the next update, which needs no hold.
            committed = account.committed
            account.held = committed + account.unposted_units
            account.free = 0
            if account.is_rate:
                continue
            if account.held > 0:
                draft.claims.append((draft.index(account), account.held))
        self._sent = Update(
            holder=self.holder,
            number=1,
            ttl_us=self._ttl_us,
            counters=tuple(draft.counters),
            posts=posts,
            claims=tuple(draft.claims),
            groups=lost.groups,
            wants=lost.wants,
            is_last=lost.is_last,
        )
