"""Checkpoint directories in and out, strict; a run's checkpoints, with the optimizer's state."""

import dataclasses
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# Reading


def load_file(path):
    """The dictionary that torch.save wrote to a file; FileNotFoundError, or ValueError if it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint directory with it")
    try:
        # files of torch before 1.6 are no archives, and can't be memory-mapped
        state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # of many kinds, as are the ways to be damaged
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: damaged, or not from torch.save; get it again ({reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: found a {type(state).__name__}, expected a dictionary of tensors")
    return state


def split_dim(name):
    """The dimension along which Meta's model-parallel files split a tensor; None: each holds all of it."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


def merge_pieces(name, pieces):
    """The whole tensor, of one piece per file; of a single file it is the piece itself, memory-mapped."""
    dim = split_dim(name)
    return pieces[0] if len(pieces) == 1 or dim is None else torch.cat(pieces, dim)


def check_tensors(where, tensors, shapes):
    """ValueError lists the tensors that are missing, unexpected, wrongly shaped or none at all.

    tensors: name -> what a file has. shapes: name -> list of sizes.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    found = {name: type(p).__name__ if not torch.is_tensor(p) else str(p.dtype) if p.dtype not in dtypes else
             str(p.layout) if p.layout != torch.strided else list(p.shape) for name, p in tensors.items()}
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {shapes.get(name, 'absent')}"
             for name in sorted(shapes | found, key=str) if found.get(name) != shapes.get(name)]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{where}: {len(wrong)} tensors don't fit the configuration: {'; '.join(wrong[:4])}"
                         + more)


def checkpoint_tensors(args, pieces):
    """Yields (name, tensor) of open_checkpoint's pieces, merged one at a time; a tied output not at all."""
    for name in pieces:
        if name != "output.weight" or not args.tie_word_embeddings:
            yield name, merge_pieces(name, pieces[name])


def load_weights(model, tensors, device, dtype):
    """Gives a model on the meta device its weights, from (name, tensor) pairs, one at a time.

    Of a sharded model each rank keeps its shard, so that no more than one tensor is ever whole.
    """
    layout, state = model.state_dict(), {}
    for name, tensor in tensors:
        if sharded := hasattr(layout[name], "placements"):
            from torch.distributed.tensor import distribute_tensor  # here, as sampling need not wait for it
            tensor = distribute_tensor(tensor, layout[name].device_mesh, layout[name].placements,
                                       src_data_rank=None)  # every rank has the same tensor: nothing is sent
        state[name] = tensor.to(device, dtype, copy=sharded)  # the copy frees the whole tensor
    if model.args.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()  # assign gives each name a parameter of its own

# -----------------------------------------------------------------------------
# Writing


def save_checkpoint(path, args, state, tokenizer_path=None, progress=None, optimizer_dir=None):
    """Writes a checkpoint directory, Meta's, which appears under its name when complete.

    state: name -> tensor. progress, optimizer_dir: what resuming needs, a dictionary that is written and a
    folder that is moved inside.
    """
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        (part / "params.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        if tokenizer_path is not None:
            shutil.copyfile(tokenizer_path, part / "tokenizer.model")
        for name, content in (("consolidated.00.pth", state), ("progress.pt", progress)):
            if content is not None:
                with open(part / name, "wb") as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(file.fileno())
        if optimizer_dir is not None:
            os.replace(optimizer_dir, part / "optimizer")
        os.replace(part, path)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error.__context__, OSError):  # torch.save raises another over it, closing its archive
            raise OSError(f"{part}: {error.__context__}") from None
        raise


def newest_checkpoint(folder="out"):
    """The checkpoint directory last written anywhere under a folder; FileNotFoundError if there is none."""
    found = [path for path in Path(folder).rglob("params.json")
             if all(parent.suffix != ".part" for parent in path.parents)]
    if not found:
        raise FileNotFoundError(f"no checkpoint under {folder}/; `python llama31.py demo` trains one in 3 "
                                "minutes, --ckpt_dir DIR takes another")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def checkpoints_of_run(out_dir):
    """The checkpoint directories that training has left in out_dir, by step."""
    found = [path for path in Path(out_dir).glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def drop_checkpoints(out_dir, keep):
    """Removes a run's checkpoint directories but for the newest few; none is ever there in part."""
    for path in checkpoints_of_run(out_dir)[:-keep]:
        part = f"{path}.part"
        os.replace(path, part)
        shutil.rmtree(part)

# -----------------------------------------------------------------------------
# Of a run


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


def save_training(path, model, optimizer, tokenizer_path, progress):
    """Writes a checkpoint directory from which training resumes; every rank takes part.

    The optimizer's state goes through torch.distributed.checkpoint, each rank writing its own part of it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    is_master = not dist.is_initialized() or dist.get_rank() == 0
    optimizer_dir = path.parent / "optimizer.part"
    if is_master:
        shutil.rmtree(optimizer_dir, ignore_errors=True)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns of a process that is alone
            dcp.save(state, checkpoint_id=optimizer_dir, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # such as no space left
        raise OSError(f"{optimizer_dir}: {cause_of(error)}") from error
    weights = whole_weights(model)
    if is_master:
        save_checkpoint(path, model.args, weights, tokenizer_path, progress, optimizer_dir)


def cause_of(error):
    """One line on an error, or on the first rank's of those that DCP gathered."""
    for cause, _ in getattr(error, "failures", {}).values():
        error = cause
        break
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def load_optimizer(path, model, optimizer):
    """Takes the optimizer's state from a checkpoint of any number of ranks, sharded as the model now is."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    state = get_optimizer_state_dict(model, optimizer)  # of zeros, filled in place
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(state["state"], checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        raise ValueError(f"{path}: damaged, or of another model; resume from an older checkpoint "
                         f"({cause_of(error)})") from error
    set_optimizer_state_dict(model, optimizer, state)
