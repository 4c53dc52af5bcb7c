"""Hugging Face's folders: what they call Llama's tensors, how they order rows, safetensors.

Tensors keep their bytes under another name. Only the rows of wq and wk have another order: Meta's RoPE turns
rows 2i and 2i + 1 of a head together, Hugging Face's turns rows i and i + D/2.
"""

import functools
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing.checkpoint import check_tensors
from plumbing.mapped import Pieces
from plumbing.text_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # says which of several files has which tensor
PART = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")  # one of several files; how many there are
NAMES = {  # Meta's name -> Hugging Face's; {} is the number of the layer
    "tok_embeddings": "model.embed_tokens",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    "layers.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
    "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}


def tensor_names(args):
    """Meta's name of every tensor -> Hugging Face's."""
    names = {}
    for layer in range(args.n_layers):
        for meta, hf in NAMES.items():
            names[f"{meta}.weight".format(layer)] = f"{hf}.weight".format(layer)
    return names


def heads_of(name, args):
    """How many heads the rows of wq and wk belong to; None: other tensors. name: Meta's."""
    return {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])


def in_order(rows, heads, to_meta):
    """So many heads' rows in the order of the other format."""
    # A head's rows are two halves in Hugging Face's order, and pairs in Meta's.
    sizes = (heads, 2, -1) if to_meta else (heads, -1, 2)
    return rows.unflatten(0, sizes).transpose(1, 2).flatten(0, 2)


def reordered(name, weight, args, to_meta):
    """A tensor with its rows in the order of the other format; name: Meta's."""
    heads = heads_of(name, args)
    return in_order(weight, heads, to_meta) if heads else weight


def is_hugging_face(ckpt_dir):
    """Whether to read a folder as Hugging Face's: it looks like one, or like neither theirs nor Meta's."""
    folder = Path(ckpt_dir)
    if any(folder.glob("consolidated.*.pth")):
        return False
    is_theirs = (folder / "config.json").exists() or any(any(folder.glob(pattern)) for pattern in FOUND)
    return is_theirs or not (folder / "params.json").exists()


def save_tensors(path, tensors, beside):
    """Writes name -> tensor as safetensors, with the permissions of a file beside it; OSError: no space."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    shutil.copymode(beside, path)  # save_file lets only the owner read.


def read_index(folder):
    """Name of a tensor -> file, as a folder's index says; {} where it has none, ValueError if damaged."""
    if not (folder / INDEX).exists():
        return {}
    files = read_json(folder / INDEX).get("weight_map")
    if not files or not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{folder / INDEX}: found no weight_map of names to files; download it again")
    return files


def weight_files(folder):
    """The paths of a folder's safetensors files; ValueError or FileNotFoundError says what lies there."""
    names = sorted(set(read_index(folder).values()))
    parts = filter(None, (PART.fullmatch(path.name) for path in sorted(folder.glob("*"))))
    counts = sorted({part[1] for part in parts})
    if not names and len(counts) > 1:
        raise ValueError(f"{folder}: found parts of {' and of '.join(counts)} files, but no {INDEX}; "
                         "download it again")
    if not names and counts:
        names = [f"model-{i:05d}-of-{counts[0]}.safetensors" for i in range(1, int(counts[0]) + 1)]
    has_single = (folder / SINGLE).exists()
    if has_single and names and SINGLE not in names:
        raise ValueError(f"{folder}: found {SINGLE} and {names[0]}, expected one of them; remove what is "
                         "not the model's")
    if not has_single and not names:
        raise FileNotFoundError(f"{folder / SINGLE}: no such file; {instead_of_weights(folder)}")
    return [folder / name for name in names or [SINGLE]]


FOUND = {  # what may lie where model.safetensors is expected -> what it is, and the way on
    "pytorch_model*.bin": "PyTorch's old format: load it with transformers, then save_pretrained",
    "adapter_*": "an adapter alone: python convert.py merge BASE ADAPTER DST adds it to its base model",
    "*.gguf": "llama.cpp's format: download the model's safetensors",
    "consolidated.safetensors": "Mistral's layout: download model.safetensors, or its parts and index",
    "original/consolidated.*.pth": "Meta's files: name the folder original in it",
    "merged/params.json": "a training's folder: name the folder merged in it",
    "best/params.json": "a training's folder: name the folder best in it",
    "step_*/params.json": "a training's folder: name one of its steps",
    "snapshots/*": "the hub's cache: name one of its snapshots",
    "*.incomplete": "a download that broke off: go on with it",
    "*.safetensors": "weights of another name: expected model.safetensors, or its parts and index",
}


def instead_of_weights(folder):
    """What a folder has in place of model.safetensors, and what to do."""
    for pattern, remedy in FOUND.items():
        if found := sorted(folder.glob(pattern)):
            return f"found {found[0].relative_to(folder)}, {remedy}"
    if folder.is_file():
        return f"{folder} is a file; name the folder that it lies in"
    if not folder.is_dir():
        return "found no such folder; fix the path"
    names = sorted(path.name for path in folder.iterdir())
    remedy = "download it again" if "config.json" in names else "name a model's folder, theirs or Meta's"
    return f"found {', '.join(names[:6]) or 'nothing'}; {remedy}"


def read_tensors(folder):
    """Name -> tensor, each in a memory map of its own, which goes from memory when the tensor goes.

    FileNotFoundError or ValueError names an absent or damaged file.
    """
    tensors = {}
    index = read_index(folder)
    for path in weight_files(folder):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected weights in it; download it again")
        try:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
            for name in names:
                if name.endswith(".inv_freq"):  # Old files have this table of RoPE's.
                    continue
                if folder / index.get(name, path.name) != path:  # The index names another file for it.
                    continue
                with safe_open(path, "pt") as file:  # Opened once for all, they would share one map.
                    tensors[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged, or not from safetensors; download it again ({error})"
                             ) from None
    return tensors


def open_pieces(ckpt_dir, args, shapes, to_meta=True):
    """As checkpoint.open_pieces, for a folder of Hugging Face's.

    shapes: Meta's name -> list of sizes. to_meta: whether rows of wq and wk get Meta's order, by which parts
    of them are copies. Errors: see read_tensors; ValueError lists tensors that don't fit.
    """
    tensors = read_tensors(Path(ckpt_dir))
    names = tensor_names(args)
    head = names["output.weight"]
    embedding = names["tok_embeddings.weight"]
    if args.tie_word_embeddings and (head in tensors or embedding in tensors):
        tensors.setdefault(head, tensors.get(embedding))
        tensors.setdefault(embedding, tensors[head])
        if not torch.equal(tensors[head], tensors[embedding]):
            raise ValueError(f"{ckpt_dir}: {head} differs from {embedding}, expected equal ones, as "
                             "config.json has tie_word_embeddings")
    check_tensors(ckpt_dir, tensors, {names[name]: shape for name, shape in shapes.items()})
    tied = torch.equal(tensors[head], tensors[embedding])
    pieces = {}
    for name, theirs in names.items():
        heads = heads_of(name, args) if to_meta else None
        order = functools.partial(in_order, to_meta=True) if heads else None
        pieces[name] = Pieces(name, [tensors[theirs]], order, heads or 1)
    return pieces, tied
