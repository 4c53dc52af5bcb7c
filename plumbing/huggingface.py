"""Hugging Face's folders: config.json, what they call Llama's tensors, how they order rows, safetensors.

Tensors keep their bytes under another name. Only the rows of wq and wk have another order: Meta's RoPE turns
rows 2i and 2i + 1 of a head together, Hugging Face's turns rows i and i + D/2.
"""

import contextlib
import dataclasses
import functools
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from plumbing.checkpoint import check_tensors
from plumbing.files import read_json
from plumbing.mapped import Pieces

# -----------------------------------------------------------------------------
# Configuration

FIELDS = {  # field of ModelArgs -> (field of config.json, its value where config.json lacks it)
    "dim": ("hidden_size", None),
    "n_layers": ("num_hidden_layers", None),
    "n_heads": ("num_attention_heads", None),
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "vocab_size": ("vocab_size", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "max_seq_len": ("max_position_embeddings", 2048),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
# We write LLAMA into every config.json; one that we read may leave out all of it but model_type. IF_GIVEN is
# not written, but must hold where a config.json has these fields.
LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
IF_GIVEN = {"pretraining_tp": 1, "sliding_window": None, "quantization_config": None}
ROPE_FIELDS = {  # field of ModelArgs -> what config.json calls it, where it scales RoPE as Llama 3.1 does
    "rope_scale_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_old_context": "original_max_position_embeddings",
}


def read_config(folder, shape, presets):
    """The shape that a folder's config.json describes; ValueError names what llama31.py does not compute.

    shape: ModelArgs. presets: the fields of published models, of which multiple_of is taken where it fits.
    """
    path = Path(folder, "config.json")
    if not path.is_file():
        weight_files(Path(folder))  # It says what lies there, if there are no weights either.
    config = {name: value for name, value in read_json(path).items() if value is not None}
    # If a file has both, transformers takes the first. RoPE's settings may also lie outside of either.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, expected an object or null")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", 10000.0),
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0), **rope}
    # This one counts first outside of both, and is the whole context where it is nowhere.
    old_context = ROPE_FIELDS["rope_old_context"]
    rope[old_context] = config.get(old_context, rope.get(old_context, config.get("max_position_embeddings")))
    kind = rope["rope_type"]
    scaling = {ours: rope.get(theirs) for ours, theirs in ROPE_FIELDS.items()} if kind == "llama3" else {}

    def require(expected, found):
        for name, value in expected.items():
            if found.get(name) != value:
                raise ValueError(f"{name} is {found.get(name)!r}, expected {value!r}: no Llama 3")

    try:
        require({**LLAMA, **IF_GIVEN}, {**LLAMA, **IF_GIVEN, "model_type": None, **config})
        require({"partial_rotary_factor": 1.0}, rope)
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope_type is {kind!r}, expected 'default' or 'llama3': RoPE is scaled as in "
                             "Llama 3.1 or not at all")
        with errors_in_their_words():
            args = shape(
                **{ours: config.get(theirs, default) for ours, (theirs, default) in FIELDS.items()},
                rope_theta=rope["rope_theta"], use_scaled_rope=kind == "llama3", **scaling)
        return with_hidden_dim(args, config.get("intermediate_size"), presets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def errors_in_their_words():
    """Gives ModelArgs' errors the names that config.json has for its fields."""
    names = {ours: theirs for ours, (theirs, _) in FIELDS.items()} | ROPE_FIELDS
    try:
        yield
    except ValueError as error:
        words = re.split(r"(\w+)", str(error))
        raise ValueError("".join(names.get(word, word) for word in words)) from None


def with_hidden_dim(args, hidden_dim, presets):
    """The shape with this SwiGLU hidden size, a number in config.json but a rule in params.json."""
    rules = []  # (multiple_of, ffn_dim_multiplier); the first that gives hidden_dim is taken
    for preset in presets:  # If they fit, the numbers are those that Meta published.
        if preset["dim"] == args.dim:
            rules.append((preset["multiple_of"], preset.get("ffn_dim_multiplier")))
    rules += [(256, None), *((2 ** k, None) for k in reversed(range(12)))]
    if type(hidden_dim) is int and hidden_dim > 0:
        rules.append((1, (hidden_dim + 0.5) / int(8 * args.dim / 3)))
        for multiple_of, multiplier in rules:
            found = dataclasses.replace(args, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if found.hidden_dim == hidden_dim:
                return found
    raise ValueError(f"intermediate_size is {hidden_dim!r}, expected a size that the SwiGLU rule can give")

# -----------------------------------------------------------------------------
# Tensors

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


def holds_weights(ckpt_dir):
    """Whether a folder is one of Hugging Face's, whole or not, or is neither theirs nor Meta's."""
    folder = Path(ckpt_dir)
    if any(folder.glob("consolidated.*.pth")):
        return False
    is_theirs = (folder / "config.json").exists() or any(any(folder.glob(pattern)) for pattern in FOUND)
    return is_theirs or not (folder / "params.json").exists()


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
    "snapshots/*": "the hub's cache: name one of its snapshots",
    "*.incomplete": "a download that broke off: go on with it",
    "*.safetensors": "weights of another name: expected model.safetensors, or its parts and index",
}


def instead_of_weights(folder):
    """What a folder has in place of model.safetensors, and what to do."""
    for pattern, remedy in FOUND.items():
        if found := sorted(folder.glob(pattern)):
            return f"found {found[0].relative_to(folder)}, {remedy}"
    if not folder.is_dir():
        return "found no such folder; fix the path"
    names = sorted(path.name for path in folder.iterdir())
    return f"found {', '.join(names[:6]) or 'nothing'}; download it again"


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


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")
