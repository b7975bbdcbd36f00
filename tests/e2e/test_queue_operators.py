"""`headgate jobs` and `headgate webhooks` against a running gateway, and the paths of the management plane below them."""

import json
import time
import urllib.error
import urllib.request

import openai
import pytest
from typer.testing import CliRunner

from gateway.commands.app import app
from tests.e2e.conftest import UNWATCHED, UPSTREAM_KEY
from tests.support.gateway_process import KEY, OPERATOR_KEY, Gateway
from tests.support.hook_receiver import HookReceiver
from tests.support.scripted_answer import Answer
from tests.support.upstream_thread import UpstreamThread

pytestmark = pytest.mark.e2e

OTHER_KEY = "sk-other-2b7d90c1e4f5a683"
LLAMA = "@cf/meta/llama-3.1-8b-instruct"
PROMPT = "the-prompt-that-no-operator-sees"
CHAT = "/v1/chat/completions"
WITHIN_S = 90.0


@pytest.fixture(scope="module")
def upstream():
    with UpstreamThread() as thread:
        yield thread.start()


@pytest.fixture(scope="module")
def gateway(upstream, tmp_path_factory):
    acme = {
        "type": "openai",
        "api_key": UPSTREAM_KEY,
        "base_url": f"{upstream.url}/v1",
        "health": UNWATCHED,
    }
    price = {"input": 1, "output": 2}
    config = {
        "providers": {"acme": acme},
        "models": {
            "plain": {"targets": [{"provider": "acme"}], "price": price},
            LLAMA: {"targets": [{"provider": "acme", "model": "plain"}], "price": price},
        },
        "keys": [{"name": "other", "key": OTHER_KEY, "team": "others"}],
        "queue": {"enabled": True, "attempts": 1, "webhooks": {"networks": ["127.0.0.0/8"]}},
    }
    with Gateway(tmp_path_factory.mktemp("gateway"), workers=2, **config) as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-8000:]


@pytest.fixture(autouse=True)
def _as_it_was(gateway, upstream):
    """Drawing, and without receivers."""
    yield
    upstream.clear()
    gateway.manage("/api/jobs/drain", "DELETE")
    for webhook in gateway.manage("/api/webhooks"):
        gateway.manage(f"/api/webhooks/{webhook['id']}", "DELETE")


@pytest.fixture
def receiver():
    with HookReceiver() as running:
        yield running


@pytest.fixture
def run(gateway, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("HEADGATE_MANAGEMENT_URL", f"http://127.0.0.1:{gateway.management_port}")
    monkeypatch.setenv("HEADGATE_OPERATOR_KEY", OPERATOR_KEY)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


def said(result) -> str:
    """The output of a command that went well."""
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result) -> str:
    """The sentence of one that did not."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def submit(gateway, key=KEY, headers=None, **fields) -> str:
    body = {"model": "plain", "messages": [{"role": "user", "content": PROMPT}]}
    job = {"endpoint": CHAT, "body": body, **fields}
    sent = {"authorization": f"Bearer {key}", **(headers or {})}
    status, _, answer = gateway.post("/v1/jobs", job, sent)
    assert status == 202, answer
    return json.loads(answer)["id"]


def until(ask, is_there):
    deadline = time.monotonic() + WITHIN_S
    while not is_there(found := ask()):
        assert time.monotonic() < deadline, f"still {found!r}"
        time.sleep(0.05)
    return found


def ended(gateway, job_id) -> dict:
    return until(
        lambda: gateway.manage(f"/api/jobs/{job_id}"),
        lambda job: job["status"] not in {"queued", "running", "cancelling"},
    )


def plane(gateway, path, method="GET", key="") -> tuple[int, dict]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"http://127.0.0.1:{gateway.management_port}{path}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, None, headers, method=method), timeout=30
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_jobs_are_held_back_listed_counted_shown_cancelled_and_let_go(gateway, run):
    assert "No more jobs are drawn" in said(run("jobs", "drain"))
    ours = [submit(gateway, reference=f"r{n}") for n in range(2)]
    theirs = submit(gateway, OTHER_KEY, **{"class": "batch"})
    table = said(run("jobs", "list", "--state", "queued"))
    assert all(job_id in table for job_id in (*ours, theirs))
    assert PROMPT not in table
    listed = json.loads(said(run("jobs", "list", "--tenant", "others", "--json")))
    assert [(job["id"], job["class"], job["status"]) for job in listed["jobs"]] == [
        (theirs, "batch", "queued")
    ]
    assert "There are more" in said(run("jobs", "list", "--limit", "1", "--state", "queued"))
    (lane,) = [
        lane for lane in json.loads(said(run("jobs", "stats", "--json")))["lanes"] if lane["lane"] == "plain"
    ]
    assert (lane["queued"], lane["flex"], lane["batch"], lane["tenants"]) == (3, 2, 1, 2)
    stats = said(run("jobs", "stats"))
    assert "3 queued" in stats
    assert "headgate jobs drain --resume" in stats
    shown = json.loads(said(run("jobs", "show", theirs, "--json")))
    assert (shown["tenant"], shown["status"], shown["door"]) == ("others", "queued", "job")
    assert shown["ahead"] >= 1
    told = said(run("jobs", "show", ours[0]))
    assert "history" in told
    assert PROMPT not in told
    assert json.loads(said(run("jobs", "cancel", ours[0], "--json")))["status"] == "cancelled"
    assert "cancelled" in said(run("jobs", "cancel", ours[0]))  # again: as it is
    assert "Jobs are drawn" in said(run("jobs", "drain", "--resume"))
    assert ended(gateway, ours[1])["status"] == "succeeded"
    assert ended(gateway, theirs)["status"] == "succeeded"
    assert "No jobs are drawn" not in said(run("jobs", "stats"))
    assert gateway.row(theirs, 60)["cost_nanousd"] > 0


def test_a_dead_job_is_handed_in_again_and_no_other(gateway, upstream, run):
    upstream.script("chat", Answer.of_error(500))
    dead = submit(gateway)
    assert ended(gateway, dead)["status"] == "dead"
    upstream.clear()
    again = json.loads(said(run("jobs", "replay", dead, "--json")))["id"]
    assert again != dead
    assert json.loads(said(run("jobs", "replay", dead, "--json")))["id"] == again
    assert ended(gateway, again)["status"] == "succeeded"
    assert again in said(run("jobs", "show", dead))
    assert "only a dead one" in refused(run("jobs", "replay", again))


def test_what_operators_get_wrong_ends_in_a_sentence(gateway, run, monkeypatch):
    for action in ("show", "cancel", "replay"):
        assert "no such job" in refused(run("jobs", action, "job_none"))
    assert "`state` is one of" in refused(run("jobs", "list", "--state", "asleep"))
    for action in ("show", "rotate", "enable", "remove", "test"):
        assert "no such webhook" in refused(run("webhooks", action, "we_none"))
    assert "no such message" in refused(run("webhooks", "replay", "msg_none"))
    assert "must be public" in refused(run("webhooks", "create", "tests", "http://10.1.2.3/hook"))
    assert "there is no event job.nothing" in refused(
        run("webhooks", "create", "tests", "https://example.com/hook", "--event", "job.nothing")
    )
    monkeypatch.setenv("HEADGATE_OPERATOR_KEY", KEY)
    assert "operator" in refused(run("jobs", "stats"))
    assert "operator" in refused(run("webhooks", "list"))
    monkeypatch.setenv("HEADGATE_MANAGEMENT_URL", "http://127.0.0.1:9")
    assert "Nothing that speaks for Headgate" in refused(run("jobs", "list"))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/jobs"),
        ("GET", "/api/jobs/stats"),
        ("GET", "/api/jobs/job_none"),
        ("POST", "/api/jobs/job_none/cancel"),
        ("POST", "/api/jobs/job_none/replay"),
        ("POST", "/api/jobs/drain"),
        ("DELETE", "/api/jobs/drain"),
        ("GET", "/api/webhooks"),
        ("GET", "/api/webhooks/messages"),
        ("POST", "/api/webhooks/we_none/test"),
        ("POST", "/api/webhooks/messages/msg_none/replay"),
    ],
)
def test_nobody_but_an_operator_reaches_the_queues_paths(gateway, method, path):
    assert plane(gateway, path, method)[0] == 401
    assert plane(gateway, path, method, "op-hg-nobodys")[0] == 401
    assert plane(gateway, path, method, KEY)[0] == 403  # a caller's key is for the other plane


def test_the_paths_refuse_what_they_do_not_know(gateway):
    for path in ("/api/jobs?limit=0", "/api/jobs?limit=x", "/api/webhooks/messages?limit=1001"):
        status, told = plane(gateway, path, key=OPERATOR_KEY)
        assert (status, "`limit`" in told["error"]["message"]) == (400, True)
    assert plane(gateway, "/api/jobs/job_none", key=OPERATOR_KEY)[0] == 404
    assert plane(gateway, "/api/webhooks/we_none", key=OPERATOR_KEY)[0] == 404


def made(run, receiver, *events) -> tuple[str, str]:
    """A receiver's id and its secret."""
    options = [word for event in events for word in ("--event", event)]
    told = said(run("webhooks", "create", "tests", receiver.url, *options))
    fields = dict(line.split(None, 1) for line in told.splitlines() if len(line.split(None, 1)) == 2)
    return fields["id"], fields["secret"]


def heard(gateway, receiver, webhook, hand_in, kind) -> tuple[str, dict, bytes]:
    """Hands in until one was known to its receiver: what was handed in, and the delivery of that kind."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        subject = hand_in()
        ended(gateway, subject) if subject.startswith("job_") else None
        told = gateway.manage(
            f"/api/webhooks/messages?subject={subject}"
        )  # written with its end, if there are any
        if any(row["to"] == webhook for row in told):
            break
        assert time.monotonic() < deadline, "no worker hears of the receiver"
    words = (kind.encode(), subject.encode())
    hook = receiver.until(
        lambda hooks: next((each for each in hooks if all(word in each.body for word in words)), None)
    )
    return subject, hook.headers, hook.body


def test_a_receiver_is_made_tried_out_told_told_again_rotated_and_removed(gateway, receiver, run):
    webhook, secret = made(run, receiver, "job.*")
    listed = said(run("webhooks", "list"))
    assert webhook in listed
    assert secret not in listed
    assert [each["id"] for each in json.loads(said(run("webhooks", "list", "--tenant", "tests", "--json")))]
    assert json.loads(said(run("webhooks", "list", "--tenant", "others", "--json"))) == []
    assert secret in said(run("webhooks", "show", webhook))
    client = openai.OpenAI(api_key="unused", base_url=gateway.base_url)

    assert "Delivered: status 200" in said(run("webhooks", "test", webhook))
    (trial,) = receiver.hooks
    client.webhooks.verify_signature(trial.body, trial.headers, secret=secret)
    assert json.loads(trial.body)["type"] == "webhook.test"
    receiver.status = 500
    assert "It was not delivered: status 500" in refused(run("webhooks", "test", webhook))
    receiver.status = 200

    job_id, headers, body = heard(gateway, receiver, webhook, lambda: submit(gateway), "job.succeeded")
    client.webhooks.verify_signature(body, headers, secret=secret)
    assert json.loads(body)["data"] == {"id": job_id}
    message = headers["webhook-id"]
    until(lambda: said(run("webhooks", "messages", job_id)), lambda table: "delivered" in table)
    rows = json.loads(said(run("webhooks", "messages", job_id, "--json")))
    (row,) = [row for row in rows if row["to"] == webhook]  # another worker may still know an earlier test's
    assert (row["id"], row["state"], row["attempts"]) == (message, "delivered", 1)
    assert "5f1e" not in json.dumps(row), "a path may be a secret of its own"

    newer = next(
        line.split()[1] for line in said(run("webhooks", "rotate", webhook)).splitlines() if "whsec_" in line
    )
    assert newer != secret
    assert "is told again" in said(run("webhooks", "replay", message))
    again = receiver.until(
        lambda hooks: (
            next(
                (
                    each
                    for each in hooks
                    if each.headers["webhook-id"] == message
                    and len(each.headers["webhook-signature"].split()) == 2
                ),
                None,
            )
            or (run("webhooks", "replay", message) and None)
        )  # workers know of the rotation within seconds
    )
    assert again.body == body
    for each in (secret, newer):
        client.webhooks.verify_signature(again.body, again.headers, secret=each)

    receiver.status = 410
    submit(gateway)
    until(lambda: said(run("webhooks", "list")), lambda table: "disabled" in table)
    assert "410" in said(run("webhooks", "show", webhook))
    receiver.status = 200
    assert "on" in said(run("webhooks", "enable", webhook))
    assert "removed" in said(run("webhooks", "remove", webhook))
    assert webhook not in said(run("webhooks", "list"))
    client.close()


def test_a_receiver_hears_of_a_workers_ai_request_when_it_is_queued_and_when_it_has_ended(
    gateway, receiver, run
):
    webhook, _ = made(run, receiver, "cf.workersAi.model.batch.*")

    def hand_in() -> str:
        path = f"/client/v4/accounts/abc/ai/run/{LLAMA}?queueRequest=true"
        status, _, answer = gateway.post(path, {"requests": [{"prompt": PROMPT}]})
        assert status == 200, answer
        return json.loads(answer)["result"]["request_id"]

    request, _, queued = heard(gateway, receiver, webhook, hand_in, "batch.queued")
    event = json.loads(queued)
    assert event["source"] == {"type": "workersAi.model", "modelName": LLAMA}
    assert event["payload"] == {"requestId": request}
    assert event["metadata"]["accountId"] == "tests"
    words = (b"batch.succeeded", request.encode())
    receiver.until(lambda hooks: any(all(word in each.body for word in words) for each in hooks))
    rows = gateway.manage(f"/api/webhooks/messages?subject={request}")
    assert [row["told"] for row in rows if row["to"] == webhook] == ["completed", "queued"]
    said(run("webhooks", "remove", webhook))


def test_a_request_may_name_who_hears_of_its_job_and_of_nothing_before(gateway, receiver, run):
    """Signed with what the tenant's requests are signed with."""
    hook = {"x-headgate-webhook": receiver.url}
    job_id = submit(gateway, headers=hook)
    found = receiver.until(lambda hooks: [each for each in hooks if job_id.encode() in each.body])
    secret = next(
        line.split()[1] for line in said(run("webhooks", "show", "tests")).splitlines() if "whsec_" in line
    )
    with openai.OpenAI(api_key="unused", base_url=gateway.base_url) as client:
        client.webhooks.verify_signature(found[0].body, found[0].headers, secret=secret)
    path = f"/client/v4/accounts/abc/ai/run/{LLAMA}"
    body = {"prompt": PROMPT, "options": {"background": True, "webhookUrl": receiver.url}}
    status, _, answer = gateway.post(path, body)
    assert status == 200, answer
    request = json.loads(answer)["result"]["request_id"]
    receiver.until(lambda hooks: any(request.encode() in each.body for each in hooks))
    rows = gateway.manage(f"/api/webhooks/messages?subject={request}")
    assert [row["told"] for row in rows if not row["to"].startswith("we_")] == ["completed"]
