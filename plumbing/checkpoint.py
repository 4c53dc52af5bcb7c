"""Checkpoint directories in and out, strict, and what a training run keeps in them.

A directory is Meta's: params.json, tokenizer.model, and the weights in one or several consolidated.NN.pth.
What Meta's loader doesn't take from params.json lies in llama31.json beside it. Only the names of tensors
and how Meta splits them are known here: a model is a value with parameters.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
from pathlib import Path

import torch

from plumbing import mapped, parallel
from plumbing.files import complete_folder
from plumbing.mapped import Pieces, split_dim
from plumbing.optimizer_state import load_optimizer, loses, save_optimizer  # noqa: F401
from plumbing.params import write_params
from plumbing.streams import say
from plumbing.tokenizer_json import copy_tokenizer
from plumbing.torch_file import map_file, save_file

# -----------------------------------------------------------------------------
# Reading


def describe(value):
    """What a file has under a tensor's name: its sizes if it is a tensor that can be read, else its kind."""
    if not torch.is_tensor(value):
        return type(value).__name__
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return str(value.dtype)
    if value.layout != torch.strided:
        return str(value.layout)
    return list(value.shape)


def check_tensors(where, tensors, shapes):
    """Raises ValueError listing the tensors that are missing, unexpected, wrongly shaped or none at all.

    tensors: name -> what a file has. shapes: name -> list of sizes.
    """
    found = {name: describe(value) for name, value in tensors.items()}
    wrong = [f"{name} is {found.get(name, 'missing')}, expected {shapes.get(name, 'absent')}"
             for name in sorted(shapes | found, key=str) if found.get(name) != shapes.get(name)]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{where}: {len(wrong)} tensors don't fit the configuration: {'; '.join(wrong[:4])}"
                         + more)


def weight_files(ckpt_dir):
    """The paths of consolidated.00.pth, 01, ...; FileNotFoundError names one that is missing."""
    files = sorted(Path(ckpt_dir).glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{ckpt_dir}: found no weights, expected consolidated.00.pth; download it "
                                "again")
    for i, path in enumerate(files):
        if path.name != f"consolidated.{i:02d}.pth":
            raise FileNotFoundError(f"{ckpt_dir}: found {path.name}, but no consolidated.{i:02d}.pth; "
                                    "download it again")
    return files


def open_pieces(ckpt_dir, shapes):
    """(name -> its Pieces, one per consolidated.NN.pth, and whether the output is tied).

    shapes: name -> list of sizes of the whole tensor. The output is tied if it is absent or equal to the
    embedding. Strict: FileNotFoundError for an absent file; ValueError names an unreadable one, lists the
    tensors that don't fit, or says that the files are of different models.
    """
    files = weight_files(ckpt_dir)
    piece_shapes = {}
    for name, shape in shapes.items():
        piece_shapes[name] = list(shape)
        dim = split_dim(name)
        if dim is None:
            continue
        if shape[dim] % len(files):
            raise ValueError(f"{ckpt_dir}: found {len(files)} files of weights, but {name} is {shape}, of "
                             f"which {len(files)} does not divide {shape[dim]}: is one missing?")
        piece_shapes[name][dim] //= len(files)
    states = [map_file(path) for path in files]
    for path, state in zip(files, states, strict=True):
        state.pop("rope.freqs", None)  # Some of Meta's files have them; they follow from params.json.
        if "output.weight" not in state and "tok_embeddings.weight" in state:
            state["output.weight"] = state["tok_embeddings.weight"]
        where = f"{path}, one of {len(files)} files" if len(files) > 1 else path
        check_tensors(where, state, piece_shapes)
        for name in shapes:
            is_whole = state is not states[0] and split_dim(name) is None
            if is_whole and not torch.equal(state[name], states[0][name]):
                raise ValueError(f"{path}: its {name} differs from that of {files[0].name}; expected files "
                                 "of one model, download them again")
    tied = all(torch.equal(state["output.weight"], state["tok_embeddings.weight"]) for state in states)
    return {name: Pieces(name, [state[name] for state in states]) for name in shapes}, tied


def load_weights(model, tensors, device, dtype=None):
    """Gives a model on the meta device its weights, from (name, tensor or Pieces) pairs, one at a time.

    dtype: of all; None: each as in the model. Of a sharded model each rank reads and keeps its part.
    """
    layout = model.state_dict()
    state = {}
    for name, tensor in tensors:
        kind = dtype or layout[name].dtype
        parts = Pieces.of(name, tensor)
        if parallel.is_sharded(layout[name]):
            part = parts.part(*parallel.own_part(layout[name]))
            # The copy lets go of the whole tensor, or of the file's map.
            state[name] = parallel.as_part(part.to(device, kind, copy=True), layout[name])
        else:
            state[name] = parts.whole().to(device, kind)
    if model.args.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, assign=True)
    model.tie()  # Assigning has given each name a parameter of its own.

# -----------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def checkpoint_folder(path, tokenizer_path=None, progress=None, optimizer_dir=None, replace=False):
    """Yields a new folder that gets what all checkpoints have; it appears at path when it is complete.

    progress, optimizer_dir: what resuming needs, a dictionary that is written and a folder that is moved
    inside. replace: whether a folder at path may be there.
    """
    with complete_folder(path, replace) as part:
        yield part
        if tokenizer_path is not None:
            copy_tokenizer(tokenizer_path, part)
        if progress is not None:
            save_file(progress, part / "progress.pt")
        if optimizer_dir is not None:
            os.replace(optimizer_dir, part / "optimizer")


def save_checkpoint(path, params, state, tokenizer_path=None, progress=None, optimizer_dir=None,
                    replace=False):
    """Writes a checkpoint directory, Meta's, which appears under its name when complete.

    params: the shape, a dictionary or a dataclass such as ModelArgs. state: name -> tensor, or what yields
    one such dictionary for each file. The others: see checkpoint_folder.
    """
    if dataclasses.is_dataclass(params):
        params = dataclasses.asdict(params)
    states = [state] if isinstance(state, dict) else state
    with checkpoint_folder(path, tokenizer_path, progress, optimizer_dir, replace) as part:
        write_params(part, params)
        for i, state in enumerate(states):
            save_file(state, part / f"consolidated.{i:02d}.pth")
            del state  # before the next one is made

# -----------------------------------------------------------------------------
# A run's checkpoints: weights, progress and the optimizer's state


def newest_checkpoint(folder="out"):
    """The checkpoint directory last written anywhere under a folder, which is said on standard error.

    FileNotFoundError if there is none.
    """
    found = [path for path in Path(folder).rglob("params.json")
             if all(parent.suffix != ".part" for parent in path.parents)]
    if not found:
        raise FileNotFoundError(f"no checkpoint under {folder}/; `python llama31.py demo` trains one in "
                                "minutes, --ckpt_dir DIR takes another")
    newest = max(found, key=lambda path: path.stat().st_mtime_ns).parent
    print(f"{newest}, the checkpoint last written", file=sys.stderr)
    return newest


def checkpoints_of_run(out_dir):
    """The checkpoint directories that training has left in out_dir, by step."""
    found = [path for path in Path(out_dir).glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def remove(path):
    """Removes a file, a link or a folder, never in part under its name; says in a line what it can't."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            part = path.with_name(path.name.removesuffix(".part") + ".part")
            os.replace(path, part)
            shutil.rmtree(part)
    except OSError as error:
        say(f"{path} can't be removed, and stays: {error}", sys.stderr)


def drop_checkpoints(out_dir, keep, best=None):
    """Removes a run's checkpoint directories but for the newest few and the best."""
    for path in checkpoints_of_run(out_dir)[:-keep]:
        if path != best:
            remove(path)


def point_best(out_dir, best):
    """Lets out_dir/best lead to the best checkpoint directory, or to nothing where that is None.

    A symbolic link, which is replaced in one step; where there can be none, one line says so.
    """
    link = Path(out_dir, "best")
    if best is None:
        if link.is_symlink():
            link.unlink()
    elif not link.is_symlink() or os.readlink(link) != best.name:
        part = link.with_name("best.part")
        remove(part)
        try:
            os.symlink(best.name, part, target_is_directory=True)
            os.replace(part, link)
        except OSError as error:  # on Windows, on some file systems, or where best is a folder of the user's
            say(f"{link} can't be a symbolic link ({error}); the best is {best}", sys.stderr)


def save_training(path, model, optimizer, tokenizer_path, progress, dtype=torch.float32, keep=None,
                  best=None, save=save_checkpoint):
    """Writes a checkpoint directory from which training resumes; every rank takes part.

    Each rank writes its own part of the optimizer's state. dtype: of the saved weights; those that are
    trained lie beside the optimizer's averages where they are of another. keep: how many of the run's newest
    directories stay; None: all. best: the one that stays, too, and to which the link `best` leads; None:
    there is none. save: writes it as save_checkpoint does, which gets what is trained.
    """
    is_master = parallel.rank_and_size()[0] == 0
    optimizer_dir = path.parent / "optimizer.part"
    if is_master:
        shutil.rmtree(optimizer_dir, ignore_errors=True)
    if hasattr(model, "reshard"):  # FSDP2 leaves the outermost weights gathered after an evaluation.
        model.reshard()
    save_optimizer(optimizer_dir, model, optimizer, dtype)
    states = mapped.weights_of_files(model, dtype)
    if not is_master:
        for _ in states:
            pass
    else:
        save(path, model.args, states, tokenizer_path, progress, optimizer_dir)
        point_best(path.parent, best)
        if keep is not None:
            drop_checkpoints(path.parent, keep, best)


def bytes_of_training(model, dtype):
    """The most that save_training writes: weights in dtype, two averages, weights again if dtype loses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    copies = 3 if loses(model, dtype) else 2
    return sum(dtype.itemsize * p.numel() + copies * p.nbytes for p in trained)
