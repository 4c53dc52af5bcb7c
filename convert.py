"""Hugging Face's checkpoint folders to Meta's, which llama31.py reads, and back.

    python convert.py from_hf SRC DST
    python convert.py to_hf SRC DST

Tensors keep their bytes under another name. Only the rows of wq and wk have another order: Meta's RoPE turns
rows 2i and 2i + 1 of a head together, Hugging Face's rows i and i + D/2.
"""

import base64
import dataclasses
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as BPE

import llama31
from plumbing import cli
from plumbing.checkpoint import check_tensors, merge_pieces, save_checkpoint
from plumbing.files import complete_folder
from tokenizer import BYTE_OF, SPECIAL_TOKENS, Tokenizer, read_vocabulary, word_splitter

# -----------------------------------------------------------------------------
# Weights

NAMES = {  # Meta's -> Hugging Face's; {} is the layer
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
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensor_names(args):
    """Meta's name of every tensor -> Hugging Face's."""
    return {f"{meta}.weight".format(layer): f"{hf}.weight".format(layer)
            for layer in range(args.n_layers) for meta, hf in NAMES.items()}


def reordered(name, weight, args, to_meta):
    """A tensor with its rows in the other format's order; name: Meta's."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows = (heads, 2, -1) if to_meta else (heads, -1, 2)  # a head's two halves, or its pairs
    return weight.unflatten(0, rows).transpose(1, 2).flatten(0, 2)


def read_tensors(folder):
    """Name -> memory-mapped tensor; FileNotFoundError or ValueError names an absent or damaged file."""
    files, tensors = [SINGLE], {}
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ValueError(f"{folder / INDEX}: found no weight_map of names to files; download it again")
        files = sorted(set(files.values()))
    for path in [folder / file for file in files]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected weights in it; download it again")
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged, or not from safetensors; download it again ({error})"
                             ) from None
    return {name: t for name, t in tensors.items() if not name.endswith(".inv_freq")}  # which old files have


def write_tensors(folder, args, pieces, max_file_bytes):
    """Writes one file after the other, in as few as max_file_bytes allows; several get an index."""
    names, groups, room = tensor_names(args), [], 0
    if args.tie_word_embeddings:
        del names["output.weight"]
    for name in names:
        num_bytes = 250 + sum(piece.nbytes for piece in pieces[name])  # 250: at most its part of the header
        if num_bytes > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= num_bytes
    weight_map, total_size = {}, 0
    for i, group in enumerate(groups, 1):
        path = folder / (SINGLE if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors")
        tensors = None  # frees the last file's before these are merged
        tensors = {names[name]: reordered(name, merge_pieces(name, pieces[name]), args, False)
                   for name in group}
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # such as no space left
            raise OSError(f"{path}: {error}") from None
        shutil.copymode(folder / "config.json", path)  # save_file lets only the owner read
        weight_map |= dict.fromkeys(tensors, path.name)
        total_size += sum(t.nbytes for t in tensors.values())
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def read_json(path):
    """The object in a JSON file; FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected one in the folder to convert")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"found {found!r:.40}, expected an object")
    except ValueError as error:
        raise ValueError(f"{path}: damaged, download it again: {error}") from None
    return found


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")

# -----------------------------------------------------------------------------
# Configuration

FIELDS = {  # ModelArgs' -> config.json's, and what the absence of that means
    "dim": ("hidden_size", None),
    "n_layers": ("num_hidden_layers", None),
    "n_heads": ("num_attention_heads", None),
    "n_kv_heads": ("num_key_value_heads", None),
    "vocab_size": ("vocab_size", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "max_seq_len": ("max_position_embeddings", 2048),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
LLAMA = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
IF_GIVEN = {"pretraining_tp": 1, "sliding_window": None, "quantization_config": None}
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_config(path):
    """The ModelArgs of a config.json; ValueError names what llama31.py does not compute."""
    config = {name: value for name, value in read_json(path).items() if value is not None}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers' precedence
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, expected an object or null")
    rope = {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", 10000.0),
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0), **rope,
            **{name: config[name] for name in LLAMA3_ROPE if name in config}}
    scaled = rope["rope_type"] != "default"

    def require(expected, found):
        for name, value in expected.items():
            if found.get(name) != value:
                raise ValueError(f"{name} is {found.get(name)!r}, expected {value!r}: no Llama 3")

    try:
        require({**LLAMA, **IF_GIVEN}, {**LLAMA, **IF_GIVEN, "model_type": None, **config})
        require({"partial_rotary_factor": 1.0}, rope)
        require({"rope_type": "llama3", **LLAMA3_ROPE} if scaled else {}, rope)
        args = llama31.ModelArgs(
            **{ours: config.get(theirs, absent) for ours, (theirs, absent) in FIELDS.items()},
            rope_theta=rope["rope_theta"], use_scaled_rope=scaled,
            rope_scale_factor=rope.get("factor") if scaled else 8.0)
        require({"head_dim": args.head_dim}, {"head_dim": args.head_dim, **config})
        return with_hidden_dim(args, config.get("intermediate_size"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def with_hidden_dim(args, hidden_dim):
    """ModelArgs with this SwiGLU hidden size, by Meta's own numbers for models of this dim if they fit."""
    rules = [(p["multiple_of"], p.get("ffn_dim_multiplier")) for p in llama31.PRESETS.values()
             if p["dim"] == args.dim]
    rules += [(256, None), *((2 ** k, None) for k in reversed(range(12)))]
    if type(hidden_dim) is int and hidden_dim > 0:
        for multiple_of, multiplier in [*rules, (1, (hidden_dim + 0.5) / int(8 * args.dim / 3))]:
            found = dataclasses.replace(args, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
            if found.hidden_dim == hidden_dim:
                return found
    raise ValueError(f"intermediate_size is {hidden_dim!r}, expected a size that the SwiGLU rule can give")


def write_config(folder, args, dtype, ids):
    """Writes config.json and generation_config.json; ids: what a tokenizer adds to both."""
    rope = {"rope_type": "llama3", "factor": args.rope_scale_factor, **LLAMA3_ROPE}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], **LLAMA, **ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(args, ours) for ours, (theirs, _) in FIELDS.items()},
        "head_dim": args.head_dim, "intermediate_size": args.hidden_dim, "rope_theta": args.rope_theta,
        "rope_scaling": rope if args.use_scaled_rope else None})

# -----------------------------------------------------------------------------
# Tokenizer

BOS = "<|begin_of_text|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# other releases number the reserved tokens differently, and name two of them
RESERVED = re.compile(r"<\|(reserved_special_token_\d+|step_id|image)\|>")


def write_tokenizer_model(source, path, vocab_size):
    """Writes the tokenizer.model of a tokenizer.json; ValueError if it isn't Llama 3's kind, or damaged."""
    data = read_json(source)
    try:
        model, vocab = data["model"], data["model"]["vocab"]
        added = {token["id"]: token["content"] for token in data["added_tokens"]}
        base = sorted((rank, token) for token, rank in vocab.items() if rank not in added)
        merged = [vocab["".join(merge).replace(" ", "")] for merge in model["merges"]]  # ["a", "b"] or "a b"
        names = dict(zip(range(len(base), vocab_size), SPECIAL_TOKENS, strict=True))
        splitter = json.loads(word_splitter().__getstate__())
        fits = (model["type"] == "BPE" and not model.get("dropout") and merged == sorted(merged)
                and data["normalizer"] is None and data["pre_tokenizer"] == splitter
                and added.keys() == names.keys() and all(
                    added[i] == names[i] or RESERVED.fullmatch(added[i]) for i in names))
        if not fits:
            raise ValueError
        with open(path, "wb") as file:
            for rank, token in base:
                token = bytes(BYTE_OF[character] for character in token)
                file.write(b"%s %d\n" % (base64.b64encode(token), rank))
        Tokenizer(path)  # checks the ranks and that every byte is there
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{source} is not Llama 3's, or not of the model's {vocab_size} tokens") from None


def write_tokenizer_json(folder, tokenizer, max_seq_len):
    """Writes tokenizer.json and tokenizer_config.json: the same ids, <|begin_of_text|> before a text."""
    character_of = {byte: character for character, byte in BYTE_OF.items()}
    ranks = {token: rank for rank, token in enumerate(read_vocabulary(tokenizer.model_path))}
    text = ["".join(character_of[byte] for byte in token) for token in ranks]
    merges = []  # all pairs that make a token, by its rank: tiktoken merges any
    for token in ranks:
        pairs = [(ranks.get(token[:cut]), ranks.get(token[cut:])) for cut in range(1, len(token))]
        merges += [(text[a], text[b]) for a, b in sorted(pair for pair in pairs if None not in pair)]
    bpe = BPE(models.BPE({token: rank for rank, token in enumerate(text)}, merges, ignore_merges=True))
    bpe.pre_tokenizer, bpe.decoder = word_splitter(), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in tokenizer.special_tokens])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.bos_id)])
    (folder / "tokenizer.json").write_text(bpe.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": BOS, "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
        "model_max_length": max_seq_len})

# -----------------------------------------------------------------------------
# Commands


def from_hf(src: str, dst: str):
    """Converts a Hugging Face folder to Meta's: params.json, consolidated.00.pth, tokenizer.model.

    Weights stay memory-mapped, but for wq and wk. A tokenizer that isn't Llama 3's kind is left out, with a
    line on standard error. ValueError or FileNotFoundError names what is absent, damaged or no Llama 3.
    """
    src, dst = Path(src), Path(dst)
    refuse_existing(dst)
    args, tensors = read_config(src / "config.json"), read_tensors(src)
    names, head, embedding = tensor_names(args), "lm_head.weight", "model.embed_tokens.weight"
    if args.tie_word_embeddings and embedding in tensors:
        if not torch.equal(tensors.get(head, tensors[embedding]), tensors[embedding]):
            raise ValueError(f"{src}: {head} differs from {embedding}, expected equal ones, as config.json "
                             "has tie_word_embeddings")
        tensors[head] = tensors[embedding]
    model = llama31.Transformer.on_meta(args)
    shapes = {names[name]: list(p.shape) for name, p in model.state_dict().items()}
    check_tensors(src, tensors, shapes)
    state = {name: reordered(name, tensors[theirs], args, True) for name, theirs in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path = Path(folder, "tokenizer.model")
        try:
            write_tokenizer_model(src / "tokenizer.json", tokenizer_path, args.vocab_size)
        except (ValueError, FileNotFoundError) as error:
            print(f"only weights are converted: {error}", file=sys.stderr)
            tokenizer_path = None
        save_checkpoint(dst, args, state, tokenizer_path)


def to_hf(src: str, dst: str, *, max_file_bytes: int = 5 * 10**9):
    """Converts a checkpoint directory to a Hugging Face folder, with its tokenizer.model if there is one.

    max_file_bytes: of a file of weights, one of which is in memory at a time; a larger tensor gets its own.
    ValueError or FileNotFoundError names what is absent, damaged or doesn't fit.
    """
    src, dst = Path(src), Path(dst)
    refuse_existing(dst)
    model, pieces = llama31.open_checkpoint(src)
    args = model.args
    if "max_seq_len" not in read_json(src / "params.json"):  # as published: Llama 3.1's and later, Llama 3's
        args.max_seq_len = 131072 if args.use_scaled_rope else 8192
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # absent, they would be 1 and 2
    with complete_folder(dst) as part:
        if (src / "tokenizer.model").exists():
            tokenizer = Tokenizer(src / "tokenizer.model")
            tokenizer.check_vocabulary(args.vocab_size)
            write_tokenizer_json(part, tokenizer, args.max_seq_len)
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_tokens),
                   "pad_token_id": tokenizer.pad_id}
        write_config(part, args, pieces["tok_embeddings.weight"][0].dtype, ids)
        write_tensors(part, args, pieces, max_file_bytes)


def refuse_existing(dst):
    if dst.exists():
        raise FileExistsError(f"{dst} exists; give the name of a new folder")


if __name__ == "__main__":
    cli.run({"from_hf": from_hf, "to_hf": to_hf}, default=None)
