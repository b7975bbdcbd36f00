import pytest

from backends.load import EndpointLoad
from policies.health.endpoint import FORGIVEN_S, PROBE_SILENCE_S, EndpointHealth
from policies.health.settings import HealthSettings

WORK = 100.0


def a_health(**settings) -> EndpointHealth:
    return EndpointHealth(EndpointLoad("gpu/0", b"gpu/0"), HealthSettings(**settings), lambda _: None)


def fail(health, now, kind="500"):
    health.attempt(now, WORK).failed(now, kind)


def answer(health, now, took_s=0.1):
    attempt = health.attempt(now, WORK)
    attempt.heard(now + took_s)
    attempt.succeeded(now + took_s)


def test_three_failures_in_a_row_take_an_endpoint_out():
    health = a_health()
    for _ in range(2):
        fail(health, 1.0)
    assert (health.state, health.endpoint.health) == ("up", 1.0)
    fail(health, 1.0)
    assert (health.state, health.endpoint.health, health.reason) == ("out", 0.0, "500")


def test_an_answer_in_between_begins_the_count_again():
    health = a_health()
    for _ in range(10):
        for _ in range(2):
            fail(health, 1.0)
        answer(health, 1.0)
    assert health.state == "up"


@pytest.mark.parametrize("kind", ["connect", "connect_timeout", "tls", "proxy"])
def test_a_connection_that_cannot_be_made_takes_it_out_at_once(kind):
    health = a_health()
    fail(health, 1.0, kind)
    assert health.state == "out"


def test_an_ejection_lasts_its_base_and_doubles_up_to_the_cap():
    health = a_health(eject_s=10, eject_max_s=60)
    now, lasted = 100.0, []
    for _ in range(5):
        fail(health, now, "connect")
        lasted.append(health.due_at - now)
        now = health.due_at
        assert not health.may_try(now - 0.01)
        assert health.may_try(now)
    assert lasted == [10, 20, 40, 60, 60]


def test_an_endpoint_that_was_whole_for_long_begins_at_the_base_again():
    health = a_health()
    fail(health, 0.0, "connect")
    answer(health, 10.0)
    health.refresh(21.0)
    assert health.state == "up"
    fail(health, 22.0 + FORGIVEN_S, "connect")
    assert health.due_at == 32.0 + FORGIVEN_S


def test_half_open_means_one_trial_at_a_time():
    health = a_health()
    fail(health, 0.0, "connect")
    assert health.may_try(10.0)
    trial = health.attempt(10.0, WORK)
    assert not health.may_try(10.0)
    trial.heard(10.1)
    trial.succeeded(10.1)
    assert health.state == "warming"


def test_a_trial_that_fails_is_another_ejection():
    health = a_health()
    fail(health, 0.0, "connect")
    fail(health, 10.0, "500")
    assert (health.state, health.due_at) == ("out", 30.0)


def test_a_trial_whose_client_leaves_is_open_again():
    health = a_health()
    fail(health, 0.0, "connect")
    health.attempt(10.0, WORK).abandoned()
    assert health.may_try(10.0)


def test_its_share_grows_slowly_after_it_came_back():
    health = a_health(slow_start_s=10)
    fail(health, 0.0, "connect")
    answer(health, 10.0, 0.0)
    shares = []
    for now in (10.0, 15.0, 20.0):
        health.refresh(now)
        shares.append(round(health.endpoint.health, 2))
    assert shares == [0.1, 0.55, 1.0]
    assert health.state == "up"


def test_while_it_warms_up_less_is_forgiven():
    health = a_health()
    fail(health, 0.0, "connect")
    answer(health, 10.0)
    fail(health, 11.0)
    fail(health, 11.0)
    assert health.state == "out"


def test_what_was_sent_before_it_came_back_says_nothing_about_it():
    health = a_health()
    stragglers = [health.attempt(0.0, WORK) for _ in range(8)]
    fail(health, 0.5, "connect")
    stragglers[0].failed(1.0, "500")
    assert health.due_at == 10.5
    answer(health, 10.5)
    for straggler in stragglers[1:]:
        straggler.failed(11.0, "first_byte_timeout")
    assert health.state == "warming"


def test_429_and_client_errors_cool_and_never_eject():
    health = a_health()
    for now in range(100):
        attempt = health.attempt(float(now), WORK)
        attempt.heard(float(now))
        attempt.abandoned()
        health.cool(float(now), 5.0)
    assert (health.state, health.cool_until_at) == ("up", 104.0)
    health.refresh(104.0)
    assert health.cool_until_at == 0.0


def test_a_probe_is_the_trial_while_somebody_tells_of_it():
    health = a_health(has_probe=True)
    fail(health, 0.0, "connect")
    health.probed(9.0, "500", is_trial=True)
    assert not health.may_try(12.0)
    health.probed(12.0, "", is_trial=False)
    assert health.state == "out"
    health.probed(12.0, "", is_trial=True)
    assert health.state == "warming"


def test_a_good_probe_does_not_shorten_the_ejection():
    health = a_health(has_probe=True)
    fail(health, 0.0, "connect")
    health.probed(5.0, "", is_trial=True)
    assert health.state == "out"


def test_without_word_from_probes_a_live_request_is_the_trial():
    health = a_health(has_probe=True)
    fail(health, 0.0, "connect")
    health.probed(1.0, "500", is_trial=True)
    assert not health.may_try(11.0)
    assert health.may_try(1.1 + PROBE_SILENCE_S)


def test_failed_looks_take_an_idle_endpoint_out():
    health = a_health()
    for reason in ("first_byte_timeout", "500", "", "500", "500"):
        health.probed(1.0, reason, is_trial=False)
    assert health.state == "up"
    health.probed(1.0, "500", is_trial=False)
    assert (health.state, health.reason) == ("out", "500")


def test_nobody_listening_takes_an_idle_endpoint_out_at_once():
    health = a_health()
    health.probed(1.0, "connect", is_trial=False)
    assert health.state == "out"


def test_a_look_that_goes_well_does_not_excuse_failed_requests():
    health = a_health()
    for _ in range(3):
        fail(health, 1.0)
        health.probed(1.0, "", is_trial=False)
    assert health.state == "out"


def test_the_word_of_another_process_is_believed():
    health = a_health()
    health.hear_out(1.0, "500", 10.0)
    assert (health.state, health.due_at) == ("out", 11.0)
    health.hear_back(5.0)
    assert health.state == "out"
    health.hear_back(10.9)
    assert health.state == "warming"


def test_a_stalled_endpoint_that_says_something_is_back():
    health = a_health()
    waiting = health.attempt(0.0, WORK)
    health.eject(5.0, "stalled")
    waiting.heard(6.0)
    assert health.state == "warming"


def test_five_answers_much_slower_than_the_others_give_take_it_out():
    health = a_health()
    health.slow_pace = 0.5 / WORK
    for _ in range(4):
        answer(health, 1.0, took_s=1.0)
    answer(health, 1.0, took_s=0.1)
    for _ in range(4):
        answer(health, 1.0, took_s=1.0)
    assert health.state == "up"
    answer(health, 1.0, took_s=1.0)
    assert (health.state, health.reason) == ("out", "slow")


def test_a_long_prompt_may_take_long():
    health = a_health()
    health.slow_pace = 0.5 / WORK
    for _ in range(10):
        attempt = health.attempt(1.0, 100 * WORK)
        attempt.heard(11.0)
        attempt.succeeded(11.0)
    assert health.state == "up"


def test_each_attempt_ends_once_and_none_is_left_waiting():
    health = a_health()
    for end in (lambda a: a.succeeded(1.0), lambda a: a.failed(1.0, "500"), lambda a: a.abandoned()):
        for is_heard in (False, True):
            attempt = health.attempt(0.0, WORK)
            if is_heard:
                attempt.heard(0.5)
            end(attempt)
            end(attempt)
            attempt.heard(2.0)
    assert health.waiting == 0


def test_zero_failures_switch_ejection_off():
    health = a_health(failures=0)
    for _ in range(100):
        fail(health, 0.0, "connect")
    health.hear_out(1.0, "500", 10.0)
    health.eject(2.0, "stalled")
    assert health.endpoint.health == 1.0
