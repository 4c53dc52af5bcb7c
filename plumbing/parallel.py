"""A model spread over several processes by torch's own engine, and its weights gathered again."""

import torch
import torch.distributed as dist


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
