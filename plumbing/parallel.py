"""Several processes by torch's own engine: their group, sums over it, a model spread over it."""

import os
import time

import torch
import torch.distributed as dist

from plumbing.fast import check_memory, choose_device


def join_process_group(device, needed=False):
    """(rank, world_size, device) of this process, in torchrun's group; without torchrun it is alone.

    A process that is alone joins a group only where needed. ValueError where there is no torchrun then.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # a GPU for each rank
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if needed and "RANK" not in os.environ:
        raise ValueError("--fsdp spreads a model over processes; start them with torchrun")
    if (world_size > 1 or needed) and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def leave_process_group():
    """Ends the group, where there is one, once every rank has come so far."""
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.1)  # gloo's threads need Python's lock to let go of tensors, else destroying can hang.
        dist.destroy_process_group()


def sum_over_ranks(values, device):
    """The sum over all ranks of each of a list of numbers, as floats."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def check_memory_of_ranks(what, num_bytes, device, shared):
    """Raises ValueError if a device has less free than a rank takes; shared: the ranks share it out."""
    if shared:
        num_bytes /= dist.get_world_size()
    if device.type == "cpu":  # The processes of a machine share its memory.
        num_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_memory(what, num_bytes, device)


def shard_parameters(model, device, dtype):
    """Spreads weights, gradients and optimizer over the ranks, which gather one block at a time (FSDP2).

    dtype: in which they gather and compute; gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh  # Sampling need not wait for this import.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "forward_cached")  # so that a sharded model can sample, too


def whole(tensor):
    """A sharded tensor as every rank has it after gathering; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(model):
    """name -> tensor, on the CPU where it was sharded; every rank takes part, the first gets them."""
    state = {}
    for name, p in model.state_dict().items():
        p = p.full_tensor().cpu() if hasattr(p, "full_tensor") else p
        if not dist.is_initialized() or dist.get_rank() == 0:
            state[name] = p
    if state and model.args.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state
