"""What a Hugging Face folder calls Llama's tensors, how it orders their rows, and its safetensors files.

Tensors keep their bytes under another name. Only the rows of wq and wk have another order: Meta's RoPE turns
rows 2i and 2i + 1 of a head together, Hugging Face's turns rows i and i + D/2.
"""

import json

from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # says which of several files has which tensor
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


def reordered(name, weight, args, to_meta):
    """A tensor with its rows in the order of the other format; name: Meta's."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    # A head's rows are two halves in Hugging Face's order, and pairs in Meta's.
    rows = (heads, 2, -1) if to_meta else (heads, -1, 2)
    return weight.unflatten(0, rows).transpose(1, 2).flatten(0, 2)


def read_tensors(folder):
    """Name -> memory-mapped tensor; FileNotFoundError or ValueError names an absent or damaged file."""
    files = [SINGLE]
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{folder / INDEX}: found no weight_map of names to files; download it again")
        files = sorted(set(files.values()))
    tensors = {}
    for path in [folder / file for file in files]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected weights in it; download it again")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (the file itself can't be iterated)
                    if not name.endswith(".inv_freq"):  # Old files have this table of RoPE's.
                        tensors[name] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged, or not from safetensors; download it again ({error})"
                             ) from None
    return tensors


def read_json(path):
    """The object in a JSON file; FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected one in the folder to convert")
    try:
        found = json.loads(path.read_bytes())  # Unlike text, bytes may begin with a byte order mark.
        if not isinstance(found, dict):
            raise ValueError(f"found {found!r:.40}, expected an object")
    except ValueError as error:
        raise ValueError(f"{path}: damaged, download it again: {error}") from None
    return found


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")
