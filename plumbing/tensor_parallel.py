"""A model that several processes split, so that each computes a part of every layer."""

import os

from plumbing.cli import expect
from plumbing.devices import choose_device
from plumbing.parallel import join_process_group, launched, rank_and_size


def processes_that_split(number, device):
    """(how many processes split a model, this process's device), of torchrun's group where they are several.

    number None: all that torchrun has started. A process that isn't to split one joins no group.
    """
    if number is None:
        number = launched()[1] if "RANK" in os.environ else 1
    return number, choose_device(device) if number == 1 else join_process_group(device)[2]


def split_model(model, device, number):
    """Splits a model on the meta device over so many processes, neighbours, as Meta splits its files.

    Each has some heads with their keys and values, some gates and some words (Shoeybi et al., 2019); results
    are added up twice a block. ValueError where the number of processes doesn't divide these.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    _, world_size = rank_and_size()
    expect(world_size % number == 0, "tensor_parallel", number,
           f"a number that divides that of the processes, {world_size}")
    expect(device.type != "mps", "device", device, "cpu or cuda, as mps sends nothing to other processes")
    for name in ("n_kv_heads", "hidden_dim", "vocab_size"):
        size = getattr(model.args, name)
        expect(size % number == 0, "the number of processes that split the model", number,
               f"one that divides {name}, {size}")
    mesh = init_device_mesh(device.type, (world_size // number, number), mesh_dim_names=("copy", "split"))
    rows = "layers.*.attention.w[qkv]", "layers.*.feed_forward.w[13]"
    columns = "layers.*.attention.wo", "layers.*.feed_forward.w2"
    plan = {"tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
            "output": ColwiseParallel(output_layouts=Replicate()),
            **dict.fromkeys(rows, ColwiseParallel()), **dict.fromkeys(columns, RowwiseParallel())}
    parallelize_module(model, mesh["split"], plan)
    model.tie()
    model.tensor_parallel = number
