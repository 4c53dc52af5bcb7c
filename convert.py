"""Checkpoint folders between Hugging Face's layout and Meta's, both to llama.cpp's file, adapters merged.

    python convert.py from_hf SRC DST
    python convert.py to_hf SRC DST
    python convert.py to_gguf SRC FILE --dtype q8_0
    python convert.py merge BASE ADAPTER DST

Without --dtype, from_hf and to_hf keep every tensor's bytes; plumbing/huggingface.py knows how their names
and the order of rows differ.
"""

import math
import tempfile
from pathlib import Path

import llama31
from plumbing import cli
from plumbing.checkpoint import save_checkpoint
from plumbing.config_json import read_config, write_config
from plumbing.devices import choose_dtype
from plumbing.files import complete_folder
from plumbing.gguf_file import choose_kind, write_gguf
from plumbing.huggingface import (
    INDEX,
    SINGLE,
    is_hugging_face,
    open_pieces,
    reordered,
    save_tensors,
    tensor_names,
)
from plumbing.lora import save_merged
from plumbing.mapped import stored_dtype, whole_tensors
from plumbing.text_files import read_json, write_json
from plumbing.tokenizer_json import copy_tokenizer
from plumbing.vocabularies import full_vocabulary, ids_of, metas_tokenizer, write_tokenizer_json
from tokenizer import Tokenizer, find_tokenizer

# -----------------------------------------------------------------------------
# Weights


def whole_tensor(name, pieces, args, dtype):
    """The tensor of some pieces with its rows in Hugging Face's order; dtype None: its own."""
    tensor = reordered(name, pieces.whole(), args, to_meta=False)
    return tensor.to(dtype or tensor.dtype)


def open_hugging_face(src, to_meta):
    """(shape, name -> pieces, whether the output is tied) of a Hugging Face folder; see open_pieces."""
    args = read_config(src, llama31.ModelArgs, llama31.PRESETS.values())
    shapes = {name: list(p.shape) for name, p in llama31.Transformer.on_meta(args).state_dict().items()}
    return args, *open_pieces(src, args, shapes, to_meta)


def open_mapped(src):
    """(shape, name -> mapped pieces, in_order for write_gguf) of a checkpoint directory of either kind."""
    if not is_hugging_face(src):
        model, pieces = llama31.open_checkpoint(src)
        return model.args, pieces, None
    args, pieces, tied = open_hugging_face(src, to_meta=False)
    args.tie_word_embeddings |= tied
    return args, pieces, lambda name, tensor: reordered(name, tensor, args, to_meta=True)


def write_tensors(folder, args, pieces, max_file_bytes, dtype):
    """Writes one file after the other, as few as max_file_bytes allows; with several goes an index.

    dtype: of all tensors; None: each keeps its own.
    """
    names = tensor_names(args)
    if args.tie_word_embeddings:
        del names["output.weight"]
    groups = []  # the names of each file's tensors
    room = 0  # bytes that the last group may still take
    for name in names:
        num_bytes = math.prod(pieces[name].shape) * (dtype or pieces[name].dtype).itemsize
        num_bytes += 250  # A tensor's entry in the file's header takes at most that.
        if num_bytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= num_bytes
    weight_map = {}  # Hugging Face's name -> file
    total_size = 0
    for i, group in enumerate(groups, 1):
        path = folder / SINGLE
        if len(groups) > 1:
            path = folder / f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}  # The previous file's tensors are freed before these are merged.
        for name in group:
            tensors[names[name]] = whole_tensor(name, pieces[name], args, dtype)
        save_tensors(path, tensors, folder / "config.json")
        weight_map |= dict.fromkeys(tensors, path.name)
        total_size += sum(t.nbytes for t in tensors.values())
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})

# -----------------------------------------------------------------------------
# Commands


def from_hf(src: str, dst: str, *, dtype: str | None = None):
    """Converts a Hugging Face folder to Meta's: params.json, consolidated.00.pth, tokenizer.model.

    A tokenizer of another kind than Llama 3's stays a tokenizer.json, with its configs and template.
    ValueError or FileNotFoundError names a file or setting that is absent, damaged or no Llama 3's.

    Args:
        src: Hugging Face folder to read
        dst: checkpoint directory to write, which must not exist yet
        dtype: type of the weights, float32, bfloat16 or float16; None: each tensor's own
    """
    src = Path(src)
    dst = Path(dst)
    refuse_existing(dst)
    dtype = choose_dtype(dtype)
    args, pieces, tied = open_hugging_face(src, to_meta=True)
    tied |= args.tie_word_embeddings
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in whole_tensors(pieces, tied)}
    if tied:
        state["output.weight"] = state["tok_embeddings.weight"]  # on one storage, whatever the type
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(dst, args, state, metas_tokenizer(src, Path(folder), args.vocab_size))


def to_hf(src: str, dst: str, *, max_file_bytes: int = 5 * 10**9, dtype: str | None = None):
    """Converts a checkpoint directory to a Hugging Face folder, with its tokenizer if there is one.

    ValueError or FileNotFoundError names a file that is absent, damaged or doesn't fit the others.

    Args:
        src: checkpoint directory to read
        dst: Hugging Face folder to write, which must not exist yet
        max_file_bytes: most bytes of a file of weights, one of which is in memory at a time
        dtype: type of the weights, float32, bfloat16 or float16; None: each tensor's own
    """
    src = Path(src)
    dst = Path(dst)
    refuse_existing(dst)
    dtype = choose_dtype(dtype)
    model, pieces = llama31.open_checkpoint(src)
    args = model.args
    # None has to be written out: transformers takes absent ids for 1 and 2.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    path = find_tokenizer(src)
    with complete_folder(dst) as part:
        if path.exists():
            tokenizer = Tokenizer(path)
            tokenizer.check_vocabulary(args.vocab_size)
            if path.name == "tokenizer.json":
                copy_tokenizer(path, part)
                ids |= read_json(part / "generation_config.json")
            else:
                write_tokenizer_json(part, tokenizer, args.max_seq_len)
                ids = ids_of(tokenizer)
        write_config(part, args, dtype or stored_dtype(pieces), ids)
        write_tensors(part, args, pieces, max_file_bytes, dtype)


def to_gguf(src: str, file: str, *, dtype: str | None = None):
    """Converts a checkpoint directory, Meta's or Hugging Face's, to llama.cpp's file, .gguf.

    The tokenizer and its chat template go along. The file appears when it is complete. ValueError or
    FileNotFoundError names a file that is absent, damaged or doesn't fit, or what GGUF can't say. llama.cpp
    also stops at tokens of some names, such as <|endoftext|>, that end no text of this model.

    Args:
        src: checkpoint directory to read
        file: file to write, which must not exist yet
        dtype: type of the matrices, f32, f16, bf16 or q8_0 (8 bits); None: as they are stored
    """
    src = Path(src)
    path = Path(file)
    refuse_existing(path, "file")
    choose_kind(dtype, None)
    args, pieces, in_order = open_mapped(src)
    kind = choose_kind(dtype, stored_dtype(pieces))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, template = full_vocabulary(src, Path(folder), args)
        path.parent.mkdir(parents=True, exist_ok=True)
        frequencies = llama31.rope_frequencies(args)
        write_gguf(path, args, pieces, kind, frequencies, vocabulary, template, in_order)


def merge(base: str, adapter: str, dst: str, *, dtype: str | None = None):
    """Adds an adapter, trained here or by peft, to its base model: a checkpoint directory in Meta's layout.

    The base's tokenizer goes along. ValueError or FileNotFoundError names a file that is absent, damaged or
    doesn't fit, or what only peft can merge.

    Args:
        base: checkpoint directory that the adapter was trained on, Meta's or Hugging Face's
        adapter: folder with adapter_config.json and adapter_model.safetensors
        dst: checkpoint directory to write, which must not exist yet
        dtype: type of the weights, float32, bfloat16 or float16; None: each tensor's own
    """
    refuse_existing(Path(dst))
    path = find_tokenizer(base)
    save_merged(dst, *llama31.open_checkpoint(base), adapter, path if path.exists() else None,
                choose_dtype(dtype))


def refuse_existing(dst, kind="folder"):
    if dst.exists():
        raise FileExistsError(f"{dst} exists; give the name of a new {kind}")


if __name__ == "__main__":
    cli.run({"from_hf": from_hf, "to_hf": to_hf, "to_gguf": to_gguf, "merge": merge}, default=None)
