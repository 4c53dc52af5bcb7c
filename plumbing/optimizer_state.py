"""The optimizer's state in a checkpoint, by torch.distributed.checkpoint: each rank has a part of it.

Where a checkpoint's weights are of a type that can't hold those that are trained, these lie here, too.
"""

import warnings

import torch
import torch.distributed as dist

MASTER = "master_weights"  # They lie beside AdamW's averages.


def loses(model, dtype):
    """Whether dtype can't hold the weights that are trained."""
    return any(torch.promote_types(p.dtype, dtype) != dtype for p in model.parameters() if p.requires_grad)


def master_weights(model):
    """name -> the weights that are trained, or this rank's shards of them."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def cause_of(error):
    """One line on an error, or on the first rank's of those that torch.distributed.checkpoint gathered."""
    failures = getattr(error, "failures", {})
    cause, _ = next(iter(failures.values()), (error, None))
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def save_optimizer(path, model, optimizer, dtype=torch.float32):
    """Writes a folder of the optimizer's state, each rank its own part; OSError says what went wrong.

    dtype: that of the saved weights; where it can't hold those that are trained, these are written, too.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    state = get_optimizer_state_dict(model, optimizer)["state"]
    if loses(model, dtype):
        state[MASTER] = master_weights(model)
    try:
        with warnings.catch_warnings(action="ignore"):  # It warns of a process that is alone.
            dcp.save(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # such as no space left
        raise OSError(f"{path}: {cause_of(error)}") from error


def load_optimizer(path, model, optimizer, dtype=torch.float32):
    """Takes the optimizer's state from a checkpoint of any number of ranks, sharded as the model now is.

    dtype: that of the saved weights; where it can't hold those that were trained, the model gets these.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    state = get_optimizer_state_dict(model, optimizer)  # zeros, filled in place
    wanted = dict(state["state"])
    if loses(model, dtype):
        wanted[MASTER] = master_weights(model)
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(wanted, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as error:  # The latter is no Exception.
        raise ValueError(f"{path}: damaged, or of another model; resume from an older checkpoint "
                         f"({cause_of(error)})") from error
    set_optimizer_state_dict(model, optimizer, state)
