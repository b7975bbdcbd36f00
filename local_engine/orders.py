"""From the specifications of a configuration to what the supervisor is told: a plan for every slot a pool may ever use.

Owns how many slots that are: those of the specification, those it may grow to, those of a surge. Refuses to start anything.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from local_engine.plan import PoolPlan, ReplicaPlan, Site
from local_engine.planning import by_claim, plan_pool, plan_replica
from local_engine.supervisor import PoolOrder, Zero
from local_engine.vllm_config import VllmConfig


def orders_of(
    specs: Mapping[str, VllmConfig], site: Site, own_keys: Mapping[str, str] = MappingProxyType({})
) -> dict[str, PoolOrder]:
    """PlanError when they do not fit on the machine together. Pools that name their GPUs come first.

    `own_keys` are those of pools, by name, whose engines are started with another key than the site's.
    """
    taken, orders = set(site.taken), dict[str, PoolOrder]()
    for name in by_claim(specs):
        key = own_keys.get(name, site.api_key)
        order = _order(name, specs[name], replace(site, api_key=key, taken=frozenset(taken)))
        taken.update(gpu.uuid for plan in order.plans for gpu in plan.gpus)
        orders[name] = order
    return {name: orders[name] for name in specs}


def _order(name: str, spec: VllmConfig, site: Site) -> PoolOrder:
    plan = plan_pool(name, spec, site)
    plans = _with_remote_parts(plan)
    scale = spec.scale
    slots = max(len(plans), scale.max if scale is not None else 0)
    taken = set(site.taken) | {gpu.uuid for replica in plans for gpu in replica.gpus}
    for slot in range(len(plans), slots + spec.supervision.surge):
        plans.append(plan_replica(name, spec, slot, replace(site, taken=frozenset(taken))))
        taken.update(gpu.uuid for gpu in plans[-1].gpus)
    wanted = spec.slots if scale is None else min(max(spec.slots, scale.min), scale.max)
    zero: Zero = scale.zero if scale is not None else "stop"
    return PoolOrder(tuple(plans), wanted, slots, spec.supervision, zero)


def _with_remote_parts(plan: PoolPlan) -> list[ReplicaPlan]:
    """Ranks on other machines come and go with the replica that they are of."""
    plans = []
    for replica in plan.replicas:
        more = [
            endpoint for part in plan.remote if part.replica == replica.name for endpoint in part.endpoints
        ]
        plans.append(replace(replica, endpoints=(*replica.endpoints, *more)) if more else replica)
    return plans
