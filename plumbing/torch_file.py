"""Files of torch.save: read strictly, each tensor in a memory map of its own, and written."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import torch


def load_file(path, map_location="cpu"):
    """The dictionary that torch.save wrote to a file; FileNotFoundError, or ValueError if it is damaged."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint directory with it")
    try:
        state = torch.load(path, map_location, weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # There are as many kinds of errors as ways to be damaged.
        raise damaged(path, error) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: found a {type(state).__name__}, expected a dictionary of tensors")
    return state


def damaged(path, error):
    reason = str(error).partition("\n")[0]
    return ValueError(f"{path}: damaged, or not from torch.save; download it again ({reason:.80})")


def record_begins(path):
    """Where the contents of a zip archive's records begin, in bytes."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)  # behind it, the lengths of the name and of what follows it
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            yield record.header_offset + 30 + name_length + extra_length


def map_file(path):
    """As load_file, each tensor in a memory map of its own, which goes from memory when the tensor goes."""
    if not zipfile.is_zipfile(path):  # Files of torch before 1.6 can't be mapped; what isn't there, neither.
        return load_file(path)
    state = load_file(path, "meta")  # Of the tensors, only shapes, and where they lie in the file.
    begins = set(record_begins(path))
    maps = {}  # offset in the file -> its bytes; tied weights share one
    for name, tensor in state.items():
        if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        storage = tensor.untyped_storage()
        offset = storage._checkpoint_offset
        if offset not in begins:  # torch reckons with its own alignment, which another program's zip lacks.
            return load_file(path)
        try:
            if offset not in maps:
                bytes_there = np.memmap(path, np.uint8, "c", offset, shape=storage.nbytes())
                maps[offset] = torch.from_numpy(bytes_there)
        except (OSError, ValueError) as error:
            raise damaged(path, error) from error
        typed = maps[offset].view(tensor.dtype)
        state[name] = typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return state


def save_file(content, path):
    with open(path, "wb") as file:  # Given a path, torch.save doesn't say why it fails.
        torch.save(content, file)
