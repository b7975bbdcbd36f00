"""A vLLM plugin, for tests only: expert parallelism on the CPU.

vLLM 0.32 starts an expert-parallel group there and cannot compute with it. Its portable kernel looks experts up by their
number in the whole model, though a rank has only its own; and its communicator cannot exchange parts of different
lengths, which is how ranks with different numbers of tokens meet. Both are supplied here, for correctness and not for
speed. vLLM calls `register` in each of its processes, some more than once (entry point `vllm.general_plugins`).
"""

import functools

import torch
from torch import distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


def register() -> None:
    compute = CPUUnquantizedExperts.apply
    if not hasattr(compute, "__wrapped__"):
        CPUUnquantizedExperts.apply = with_local_experts(compute)
        CpuCommunicator.all_gatherv = gathered
        CpuCommunicator.reduce_scatterv = reduced


def with_local_experts(compute):
    """Experts of other ranks count for nothing here: their ranks add them, and the sum over ranks is the layer."""

    @functools.wraps(compute)
    def apply(self, *, topk_ids, topk_weights, expert_map, **rest):
        if expert_map is not None:
            own = expert_map[topk_ids.to(torch.int64)]
            is_here = own.ge(0)
            topk_ids = own.clamp(min=0).to(topk_ids.dtype)
            topk_weights = topk_weights * is_here
        compute(self, topk_ids=topk_ids, topk_weights=topk_weights, expert_map=expert_map, **rest)

    return apply


def gathered(communicator, part, dim=0, sizes=None):
    """The parts of all ranks, one after the other: each rank tells the others its own."""
    if not isinstance(part, torch.Tensor):
        return [gathered(communicator, each, dim, sizes) for each in part]
    assert dim == 0, dim
    sizes = sizes or [part.shape[0]] * communicator.world_size
    parts = [part.new_empty((size, *part.shape[1:])) for size in sizes]
    parts[communicator.rank_in_group] = part.contiguous()
    for place, each in enumerate(parts):
        if each.numel():
            distributed.broadcast(each, communicator.ranks[place], group=communicator.device_group)
    return torch.cat(parts)


def reduced(communicator, whole, dim=-1, sizes=None):
    """This rank's part of the sum of what all ranks have."""
    assert dim == 0, dim
    total = whole.to(torch.float32, copy=True)
    distributed.all_reduce(total, group=communicator.device_group)
    own = communicator.rank_in_group
    sizes = sizes or [len(total) // communicator.world_size] * communicator.world_size
    return total.split(sizes)[own].to(whole.dtype)
