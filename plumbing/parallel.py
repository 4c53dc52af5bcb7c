"""Several processes by torch's own engine: their group, sums over it, a model spread over it."""

import itertools
import os
import time

import torch
import torch.distributed as dist

from plumbing.cli import expect
from plumbing.devices import choose_device
from plumbing.fast import check_memory


def launched():
    """(rank, world_size) as torchrun's variables say; (0, 1) where there are none.

    ValueError where they are incomplete, or where another launcher has started several processes without
    them, for each of which would take itself for the only one.
    """
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not found:
        refuse_other_launchers()
        return 0, 1
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ValueError(f"found {found} in the environment; expected RANK and WORLD_SIZE, numbers, the "
                         "first the smaller one: start with torchrun, or unset both")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(world_size) > 1 and missing:
        raise ValueError(f"found WORLD_SIZE {world_size}, but no {missing[0]} in the environment; start "
                         "with torchrun, which sets it")
    return int(rank), int(world_size)


def refuse_other_launchers():
    """Raises ValueError in a process that is one of several of SLURM or MPI."""
    tasks = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
    if "SLURM_PROCID" in os.environ:  # Only a task has it, a shell that salloc opened doesn't.
        step = "SLURM_STEP_NUM_TASKS"  # A step may have fewer tasks than the job, SLURM_NTASKS.
        tasks[step if step in os.environ else "SLURM_NTASKS"] = "srun"
    for name, launcher in tasks.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise ValueError(f"found {name} {count}, but no variables of torchrun: each task would work by "
                             f"itself; let {launcher} start a single one, or one a node that is "
                             "`torchrun --nnodes NODES --nproc_per_node GPUS ...`")


def join_process_group(device, needed=False):
    """(rank, world_size, device) of this process, in torchrun's group; without torchrun it is alone.

    A process that is alone joins a group only where needed. ValueError where there is no torchrun then.
    """
    rank, world_size = launched()
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


def rank_and_size():
    """(rank, number of ranks) of this process in its group; (0, 1) where it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values, device):
    """The sums over all ranks of N numbers, or tensors of one: float64 (N,), on the device; mps: the CPU."""
    if device.type == "mps":  # It has no float64, and no other ranks.
        device = torch.device("cpu")
    sums = torch.stack([value.to(device).double() if isinstance(value, torch.Tensor)
                        else torch.tensor(value, dtype=torch.float64, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums


def largest_over_ranks(number, device):
    """The largest of all ranks' whole numbers."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def gather_over_ranks(value):
    """The list of every rank's value, a picklable one."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ranks_that_share(fsdp):
    """How many ranks share out one copy of the weights; fsdp: False, True for all, or that number.

    ValueError where it doesn't divide the number of ranks.
    """
    _, world_size = rank_and_size()
    number = (world_size if fsdp else 1) if isinstance(fsdp, bool) else fsdp
    expect(number > 0 and world_size % number == 0, "fsdp", number,
           f"a number that divides that of the processes, {world_size}")
    return number


def check_memory_of_ranks(what, num_bytes, device, sharing):
    """Raises ValueError if a device has less free than a rank takes; sharing: how many share it out."""
    num_bytes /= sharing
    if device.type == "cpu":  # The processes of a machine share its memory.
        num_bytes *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_memory(what, num_bytes, device)


def shard_parameters(model, device, dtype, sharing):
    """Spreads weights, gradients and optimizer over ranks, which gather one block at a time (FSDP2).

    dtype: in which they gather what is trained. Beside frozen weights, each is gathered as it is stored, as
    that may be int8 and its scales. Gradients are summed in float32. sharing: how many ranks, neighbours,
    hold one copy; where there are several copies, their gradients are summed (HSDP).
    """
    from torch.distributed.device_mesh import init_device_mesh  # Sampling need not wait for this import.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    copies = dist.get_world_size() // sharing
    sizes = {"copy": copies, "shard": sharing} if copies > 1 else {"shard": sharing}
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    gathered = dtype if all(p.requires_grad for p in model.parameters()) else None
    policy = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # While a block computes, the next one's weights are on their way; in the backward pass the one's before.
    for layer, following in itertools.pairwise(model.layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    register_fsdp_forward_method(model, "forward_cached")  # so that a sharded model can sample, too


def is_sharded(tensor):
    """Whether a tensor is spread over ranks, each of which holds a part."""
    return hasattr(tensor, "placements")


def own_part(tensor):
    """(offsets, sizes) of this rank's part of a sharded tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    spread = tensor.device_mesh, tensor.placements
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, *spread)
    return offsets, sizes


def as_part(part, like):
    """The sharded tensor, spread as another one is, of which this rank has that part."""
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                              stride=like.stride())


def whole(tensor):
    """A sharded tensor as every rank has it after gathering; another one as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
