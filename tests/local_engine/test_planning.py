import socket
from dataclasses import replace
from pathlib import Path

import pytest

from local_engine.command import inherited
from local_engine.free_ports import FreePorts
from local_engine.gpus import Machine
from local_engine.orders import orders_of
from local_engine.plan import PlanError
from local_engine.planning import fixed_ports, plan_pool, plan_pools, plan_replica, process_env
from local_engine.vllm_config import VllmConfig
from tests.local_engine.plan_cases import MACHINE, QWEN, SLICED, site


def spec(**settings) -> VllmConfig:
    return VllmConfig.model_validate({"model": QWEN, **settings})


def uuids(plan) -> list[list[str]]:
    return [[gpu.uuid for gpu in replica.gpus] for replica in plan.replicas]


def test_gpus_are_given_out_in_turn_and_those_that_are_named_first():
    specs = {"auto": spec(replicas=2), "named": spec(gpus=[0, 2], tensor_parallel_size=2), "more": spec()}
    plans = plan_pools(specs, site())
    assert list(plans) == ["auto", "named", "more"]
    assert uuids(plans["named"]) == [["GPU-00000000", "GPU-00000002"]]
    assert uuids(plans["auto"]) == [["GPU-00000001"], ["GPU-00000003"]]
    assert uuids(plans["more"]) == [["GPU-00000004"]]


def test_a_pool_that_grows_takes_what_is_free_or_what_was_listed_for_it():
    taken = frozenset(gpu.uuid for gpu in MACHINE.gpus[:3])
    grown = plan_replica("p", spec(), 5, replace(site(), taken=taken))
    assert (grown.name, grown.gpus[0].index) == ("p/5", 3)
    listed = spec(gpus=[4, 5, 6])
    assert plan_replica("p", listed, 2, site()).gpus[0].index == 6
    with pytest.raises(PlanError, match="replica 3 needs 1 more than are listed"):
        plan_replica("p", listed, 3, site())


@pytest.mark.parametrize(
    ("settings", "machine", "words"),
    [
        ({}, Machine(), "to run on the CPU, write gpus: none"),
        ({"replicas": 9}, MACHINE, "replica 8 needs 1 GPUs and 0 of 8 are free; lower replicas"),
        ({"tensor_parallel_size": 2}, SLICED, "needs 2 GPUs and 0 of 2 are free"),
        ({"gpus": [8]}, MACHINE, "there is no single GPU 8 here"),
        ({"gpus": [0]}, SLICED, "of a GPU cut by MIG, name the slices"),
        ({"gpus": ["GPU-0000ffff"]}, MACHINE, "there is no single GPU GPU-0000ffff"),
        ({"model": "/no/such/folder"}, MACHINE, "there is no folder /no/such/folder"),
    ],
)
def test_what_the_machine_does_not_have_is_said_with_what_to_change(settings, machine, words):
    with pytest.raises(PlanError, match=words) as caught:
        plan_pool("p", spec(**settings), site(machine))
    assert str(caught.value).startswith("pools.p.vllm")


def test_two_pools_share_a_gpu_only_when_they_say_how_much_each_takes():
    both = {"a": spec(gpus=[0]), "b": spec(gpus=[0])}
    with pytest.raises(PlanError, match="give both pools a gpu_memory_utilization"):
        plan_pools(both, site())
    both = {name: spec(gpus=[0], gpu_memory_utilization=0.4) for name in both}
    assert uuids(plan_pools(both, site())["b"]) == [["GPU-00000000"]]


def test_a_socket_whose_path_the_kernel_does_not_take_is_refused():
    with pytest.raises(PlanError, match="too long"):
        plan_pool("p" * 64, spec(), replace(site(), run_directory=Path("/" + "d" * 60)))


def test_pools_of_other_machines_may_have_a_key_of_their_own():
    orders = orders_of({"a": spec(), "b": spec()}, site(), {"b": "its-own"})
    assert orders["a"].plans[0].env["VLLM_API_KEY"] == "the-key-of-this-start"
    assert orders["b"].plans[0].env["VLLM_API_KEY"] == orders["b"].plans[0].api_key == "its-own"


def test_an_engine_inherits_no_providers_key():
    environ = {
        "PATH": "/bin",
        "OPENAI_API_KEY": "sk",
        "HF_TOKEN": "hf",
        "NCCL_DEBUG": "INFO",
        "HEADGATE_PEPPER": "p",
    }
    assert inherited(environ) == {"PATH": "/bin", "HF_TOKEN": "hf", "NCCL_DEBUG": "INFO"}
    whole = process_env(plan_pool("p", spec(), site()).replicas[0], environ | {"VLLM_API_KEY": "another"})
    assert whole["VLLM_API_KEY"] == "the-key-of-this-start"


def test_ports_that_are_said_are_known_without_a_plan():
    assert fixed_ports(spec()) == range(0)
    assert fixed_ports(spec(port=8100, replicas=3)) == range(8100, 8103)
    roles = spec(port=8100, roles={"prefill": 1, "decode": 1})
    assert fixed_ports(roles) == range(8100, 8104)
    plan = plan_pool("p", roles, site())
    assert [replica.ports for replica in plan.replicas] == [(8100, 8101), (8102, 8103)]


def test_free_ports_are_in_a_row_kept_for_their_replica_and_nobody_elses():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        first = held.getsockname()[1]
        ports = FreePorts(range(first, first + 1))
        with pytest.raises(PlanError, match="no 1 free ports in a row"):
            ports.take("p/0", 1, "127.0.0.1")
    ports = FreePorts()
    one, other = ports.take("p/0", 3, "127.0.0.1"), ports.take("p/1", 3, "127.0.0.1")
    assert abs(one - other) >= 3
    assert ports.take("p/0", 3, "127.0.0.1") == one
