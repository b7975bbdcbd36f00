"""The situations in which policies are compared. Each returns plain figures; what they are to show is in README.md."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

from backends.load import EndpointLoad
from bench.routing.baselines import OWN, maker
from bench.routing.figures import Figures, cost_usd
from bench.routing.simulation import Record, Simulation
from bench.routing.traces import AgentTraffic, Conversation, Turn, read_mooncake
from local_engine.simulator.engine import EngineSettings
from policies.placement.ask import Ask

# Of the order of a 32B model on two large GPUs: 15,900 prompt tokens a second (llm-d's figure for Qwen3-32B, TP2, H100),
# 300,000 tokens of KV memory. Not fitted to a machine.
ENGINE = EngineSettings(
    block_size=64,
    num_blocks=4700,
    max_num_seqs=128,
    max_num_batched_tokens=2048,
    max_model_len=200_000,
    prefill_overhead_us=20_000.0,
    prefill_us_per_token=63.0,
    decode_us_per_token=12_000.0,
    load_factor=2.0,
    kv_read_us_per_token=0.04,
)
REPLICAS = 8
POPULATION = 100  # conversations under way: their contexts are about the pool's whole KV memory
SLO_S = 1.0  # of the first token, for nine requests in ten
PRICED_AS = ("openai", "gpt-5.1")


@dataclass(frozen=True, slots=True)
class Length:
    """How long to run: seeds, seconds before the measured time, and seconds in all."""

    seeds: Sequence[int]
    from_s: float
    until_s: float


FULL = Length((1, 2), 200.0, 500.0)
QUICK = Length((1,), 150.0, 270.0)


def simulation(
    policy: str, replicas: int = REPLICAS, *, processes: int = 1, engine: EngineSettings = ENGINE
) -> Simulation:
    """The product's policies pass full replicas over, as the gateway does; the baselines know nothing of load."""
    heeds_room = policy in OWN and policy != "round-robin"
    settings = {"prefill_tokens_per_s": 1e6 / engine.prefill_us_per_token} if policy == "prefix" else {}
    return Simulation(engine, replicas, maker(policy, **settings), processes=processes, heeds_room=heeds_room)


def conversations(traffic: AgentTraffic) -> Iterator[Conversation]:
    return map(traffic.conversation, count())


def nameless(traffic: AgentTraffic) -> Iterator[Conversation]:
    """The same, from clients that name no session."""
    for conversation in conversations(traffic):
        conversation.has_session = False
        yield conversation


def agents(
    policy: str, length: Length, *, population: int = POPULATION, processes: int = 1, named: bool = True
) -> Figures:
    """Agents whose contexts are about as much as all replicas together can hold."""
    runs = []
    for seed in length.seeds:
        source = (conversations if named else nameless)(AgentTraffic(seed=seed))
        run = simulation(policy, processes=processes)
        record = run.run(source, until_s=length.until_s, from_s=length.from_s, population=population)
        assert run.loads_left() == 0, "a counter did not come back to zero"
        runs.append(Figures.of(record))
    return Figures.mean(runs)


def working_set(population: int = POPULATION) -> float:
    """The contexts of so many conversations, taken at a moment of their lives, over the pool's KV memory."""
    rng, traffic, tokens, lived = random.Random(1), AgentTraffic(), 0.0, 0.0
    for conversation in islice(conversations(traffic), 500):
        context = 0
        for turn in conversation.turns:
            wait_s = turn.wait_s + 0.014 * turn.output_tokens
            tokens += (context + rng.random() * turn.added_tokens) * wait_s
            lived += wait_s
            context += turn.added_tokens + turn.output_tokens
    return population * tokens / lived / (REPLICAS * ENGINE.num_blocks * ENGINE.block_size)


def throughput(policy: str, length: Length, populations: Sequence[int]) -> list[tuple[int, Figures]]:
    return [(population, agents(policy, length, population=population)) for population in populations]


def at_slo(points: Sequence[tuple[int, Figures]]) -> float:
    """Requests a second at the largest load whose p90 of the first token is within the SLO; 0 if none is."""
    return max((figures.per_s for _, figures in points if figures.ttft_p90 <= SLO_S), default=0.0)


def decode_bound(policy: str, length: Length) -> Figures:
    """Short questions that share nothing, long answers: caches are worth nothing here, and affinity must cost nothing."""
    runs = []
    for seed in length.seeds:
        rng = random.Random(seed)
        asked = (Conversation(n, [Turn(0.0, rng.randint(100, 400), rng.randint(300, 900))]) for n in count())
        record = simulation(policy).run(asked, until_s=length.until_s, from_s=length.from_s, population=480)
        runs.append(Figures.of(record))
    return Figures.mean(runs)


def recorded(policy: str, path: Path, replicas: int, speed: float) -> Figures:
    """A file in Mooncake's format, played at `speed`. Nobody names a session."""
    requests = read_mooncake(path, speed=speed)
    until_s = max(request.at_s for request in requests) + 1.0
    return Figures.of(simulation(policy, replicas).run(requests, until_s=until_s))


def priced(policy: str, length: Length) -> tuple[Record, float, float]:
    """The same conversations played to their end under every policy, and their price: (record, dollars, of answers)."""
    source = islice(conversations(AgentTraffic(seed=length.seeds[0])), 300 if length is FULL else 120)
    record = simulation(policy).run(source, until_s=1e9, population=POPULATION)
    return record, *cost_usd(record, *PRICED_AS)


_HOT = 10_000_000  # the flood's conversations are numbered from here
_HOT_TOKENS = 12_000


@dataclass(frozen=True, slots=True)
class Flood:
    """Hit rates before, during and after a flood of one session, of everybody else's requests; by replica where it says so."""

    before: float
    during: float
    after: float
    worst_replica: float
    flood_hit_rate: float
    ttft_p90: float
    flood_ttft_p90: float
    preemptions: int


def flood(policy: str, length: Length) -> Flood:
    """Sixty agents, and for two minutes one session that sends 40 requests a second with the same long beginning."""
    from_s, for_s = length.from_s, 120.0
    parallel = 160
    run = simulation(policy)
    rng = random.Random(5)

    def start(simulation: Simulation, now: float) -> None:
        for n in range(parallel):
            waits = [rng.expovariate(1 / 3.0) for _ in range(60)]
            turns = [Turn(wait_s, 200 if k else _HOT_TOKENS, 60) for k, wait_s in enumerate(waits)]
            asked = Conversation(_HOT + n, turns, group=_HOT, shared_tokens=_HOT_TOKENS)
            asked.session, asked.ends_s = _HOT, now + for_s
            simulation.join(asked, now)

    source = conversations(AgentTraffic(seed=length.seeds[0]))
    record = run.run(
        source, until_s=from_s + 3 * for_s, from_s=from_s, population=60, changes=[(from_s + for_s, start)]
    )
    return _flood_figures(record, from_s + for_s, for_s)


def _flood_figures(record: Record, began_s: float, for_s: float) -> Flood:
    cached = dict.fromkeys(("before", "during", "after", "flood"), 0)
    asked = dict(cached)
    by_replica: dict[int, list[int]] = {}
    ttfts: dict[str, list[float]] = {"during": [], "flood": []}
    columns = zip(
        record.at_s,
        record.conversation,
        record.prompt_tokens,
        record.cached_tokens,
        record.ttft_s,
        record.replica,
        strict=True,
    )
    for at_s, number, prompt, hit, ttft_s, replica in columns:
        phase = "before" if at_s < began_s else "during" if at_s < began_s + for_s else "after"
        name = "flood" if number >= _HOT else phase
        cached[name] += hit
        asked[name] += prompt
        if name in ttfts:
            ttfts[name].append(ttft_s)
        if phase == "during":
            sums = by_replica.setdefault(replica, [0, 0])
            sums[0] += hit
            sums[1] += prompt
    rate = {name: cached[name] / max(1, asked[name]) for name in cached}
    p90 = {name: sorted(times)[int(0.9 * len(times))] if times else 0.0 for name, times in ttfts.items()}
    worst = min((hit / prompt for hit, prompt in by_replica.values()), default=0.0)
    return Flood(
        rate["before"],
        rate["during"],
        rate["after"],
        worst,
        rate["flood"],
        p90["during"],
        p90["flood"],
        record.preemptions,
    )


def keys_moved(policy: str, replicas: int = 10, keys: int = 20_000) -> tuple[float, float]:
    """Shares of sessions that live elsewhere after one of ten left, and after one joined ten; asked of new processes."""
    pool = [EndpointLoad(f"pool/{n}", f"http://10.0.0.{n}:8000/v1".encode()) for n in range(replicas + 1)]
    asks = [Ask(session=random.Random(n).getrandbits(64) | 1, prompt_tokens=1000) for n in range(keys)]

    def homes(endpoints: Sequence[EndpointLoad]) -> list[str]:
        placer = maker(policy)()
        return [placer.rank(endpoints, endpoints, ask, 0.0).endpoints[0].name for ask in asks]

    ten, nine, eleven = homes(pool[:-1]), homes(pool[:-2]), homes(pool)
    return _different(ten, nine), _different(ten, eleven)


def _different(some: Sequence[str], others: Sequence[str]) -> float:
    return sum(one != other for one, other in zip(some, others, strict=True)) / len(some)


@dataclass(frozen=True, slots=True)
class Change:
    """Of the turns in the minute after one of ten replicas was taken out, and after it was given back: which moved?

    `bystanders_moved`: of conversations whose replica was neither.
    """

    moved_on_removal: float
    bystanders_moved_on_removal: float
    moved_on_return: float
    hit_rate_before: float
    hit_rate_after_removal: float
    hit_rate_after_return: float


def change(policy: str, length: Length) -> Change:
    out_s, back_s, for_s = length.from_s + 60.0, length.from_s + 180.0, 60.0
    run = simulation(policy, 10)
    gone = run.replicas[3]
    record = run.run(
        conversations(AgentTraffic(seed=length.seeds[0])),
        until_s=back_s + 2 * for_s,
        from_s=length.from_s,
        population=100,
        changes=[
            (out_s, lambda simulation, _: simulation.remove_replica(gone)),
            (back_s, lambda simulation, _: simulation.return_replica(gone)),
        ],
    )
    turns = sorted(
        zip(
            record.at_s,
            record.conversation,
            record.replica,
            record.cached_tokens,
            record.prompt_tokens,
            strict=True,
        )
    )
    last: dict[int, int] = {}
    moves: dict[str, list[tuple[bool, bool]]] = {"out": [], "back": []}
    hits: dict[str, list[int]] = {name: [0, 0] for name in ("before", "out", "back")}
    for at_s, number, replica, cached, prompt in turns:
        phase = "before" if at_s < out_s else "out" if at_s < back_s else "back"
        hits[phase][0] += cached
        hits[phase][1] += prompt
        since_s = at_s - (out_s if phase == "out" else back_s)
        if number in last and phase != "before" and since_s < for_s:
            moves[phase].append((last[number] != replica, last[number] != gone.number))
        last[number] = replica
    rates = {name: hit / max(1, prompt) for name, (hit, prompt) in hits.items()}
    return Change(
        _share([moved for moved, _ in moves["out"]]),
        _share([moved for moved, is_bystander in moves["out"] if is_bystander]),
        _share([moved for moved, _ in moves["back"]]),
        rates["before"],
        rates["out"],
        rates["back"],
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


@dataclass(frozen=True, slots=True)
class Scaled:
    replicas: int
    requests: int
    simulated_s: float
    cpu_s: float
    hit_rate: float
    balance: float


def scaled(policy: str, replicas: int, requests: int) -> Scaled:
    """A pool of so many replicas until so many requests are answered, on one core. Coarser blocks: memory, not truth."""
    engine = replace(ENGINE, block_size=256, num_blocks=1175)
    run = simulation(policy, replicas, engine=engine)
    population = POPULATION * replicas // REPLICAS
    until_s = 30.0 + requests / (0.12 * population)
    began_s = time.process_time()
    record = run.run(conversations(AgentTraffic()), until_s=until_s, from_s=20.0, population=population)
    cpu_s = time.process_time() - began_s
    figures = Figures.of(record)
    return Scaled(replicas, run.decisions, until_s, cpu_s, figures.hit_rate, figures.balance)
