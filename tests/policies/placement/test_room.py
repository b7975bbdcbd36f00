"""Who is next when there is room again."""

from policies.placement.priority import PRIORITIES, PrioritiesConfig, ceilings
from policies.placement.room import Room, Throughput

SYSTEM, INTERACTIVE, DEFAULT, BULK = range(4)


def a_room(**classes):
    return Room(PrioritiesConfig.model_validate(classes).classes())


def served(room, now, count):
    """Who gets in, one after the other."""
    got = []
    for _ in range(count):
        waiter = room.order(now)[0]
        room.serve(waiter)
        got.append(waiter.item)
    return got


def test_item_13_higher_classes_go_first():
    room = a_room()
    for priority in (BULK, DEFAULT, SYSTEM, INTERACTIVE):
        room.enter("t", priority, 0.0, PRIORITIES[priority])
    assert served(room, 0.0, 4) == list(PRIORITIES)


def test_item_13_waiting_raises_a_request_so_that_nothing_starves():
    room = a_room(bulk={"ageing_s": 10, "wait_s": 1000})
    room.enter("t", BULK, 0.0, "old bulk")
    for second in (1, 5, 9):
        room.enter("t", INTERACTIVE, float(second), f"interactive {second}")
        assert served(room, float(second), 1) == [f"interactive {second}"]
    room.enter("t", INTERACTIVE, 31.0, "interactive")
    assert served(room, 31.0, 1) == ["old bulk"]


def test_item_13_tenants_take_turns_however_many_requests_one_has():
    room = a_room()
    for n in range(100):
        room.enter("greedy", DEFAULT, float(n) / 1000, "greedy")
    for _ in range(3):
        room.enter("modest", DEFAULT, 1.0, "modest")
    assert served(room, 1.0, 6).count("modest") == 3


def test_a_tenants_own_requests_keep_their_order():
    room = a_room()
    for n in range(5):
        room.enter("t", DEFAULT, float(n), n)
    assert served(room, 5.0, 5) == [0, 1, 2, 3, 4]


def test_a_class_that_is_full_takes_nobody_else():
    room = a_room(default={"waiting": 2})
    assert room.enter("t", DEFAULT, 0.0, 1) is not None
    assert room.enter("t", DEFAULT, 0.0, 2) is not None
    assert room.enter("t", DEFAULT, 0.0, 3) is None
    assert room.enter("t", INTERACTIVE, 0.0, 4) is not None
    assert len(room) == 3


def test_whoever_leaves_is_gone_at_once_and_may_leave_twice():
    room = a_room()
    first = room.enter("t", DEFAULT, 0.0, "first")
    room.enter("t", DEFAULT, 1.0, "second")
    room.leave(first)
    room.leave(first)
    assert len(room) == 1
    assert served(room, 1.0, 1) == ["second"]
    assert len(room) == 0
    assert room.order(1.0) == []


def test_time_runs_out_for_those_who_have_waited_as_long_as_they_may():
    room = a_room(default={"wait_s": 5})
    room.enter("t", DEFAULT, 0.0, "early")
    room.enter("t", DEFAULT, 3.0, "late")
    assert [w.item for w in room.overdue(5.0)] == ["early"]


def test_a_reserve_lowers_the_ceiling_of_those_below():
    classes = PrioritiesConfig.model_validate({"system": {"reserved": 0.1}, "interactive": {"reserved": 0.2}})
    assert [round(ceiling, 3) for ceiling in ceilings(classes.classes())] == [1.0, 0.9, 0.7, 0.7]


def test_the_time_to_wait_grows_with_those_ahead_and_shrinks_with_those_being_served():
    throughput = Throughput()
    assert throughput.wait_s(0, 10) == 1.0  # nothing is known yet
    for _ in range(100):
        throughput.ended(10.0)
    assert throughput.wait_s(0, 10) == 1.0
    assert throughput.wait_s(9, 10) == 10.0
    assert throughput.wait_s(9, 20) == 5.0
