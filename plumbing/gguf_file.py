"""GGUF, the file that llama.cpp, Ollama and LM Studio read: weights, vocabulary and chat template in one.

The gguf package knows the format; here stands how a Llama and a byte-level BPE are written in it.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as BPE
from tokenizers import models

from plumbing.chat_template import read_template
from plumbing.files import check_disk, complete, read_json
from tokenizer import word_splitter

TYPES = ("f32", "f16", "bf16", "q8_0")  # of matrices; norms are float32 in each

# -----------------------------------------------------------------------------
# The file


def write_gguf(path, args, frequencies, shapes, tensors, dtype, vocabulary=None):
    """Writes a model as one file, which appears when it is complete; few tensors at a time are in memory.

    args: its ModelArgs. frequencies: its RoPE's, (D/2,) float32. shapes: Meta's name -> sizes. tensors:
    (name, tensor) in the order of shapes. dtype: one of TYPES. vocabulary: what describe_vocabulary takes;
    None: the file is for token ids alone. ValueError: GGUF can't say it. OSError: the disk is full.
    """
    import gguf
    path = Path(path)
    kinds = gguf.GGMLQuantizationType
    matrix_kind = kinds[dtype.upper()]
    width, _ = gguf.GGML_QUANT_SIZES[matrix_kind]  # So many weights of a row are quantized together.
    kind_of = {}  # name -> how its tensor is stored
    num_bytes = {}
    for name, shape in shapes.items():
        kind_of[name] = matrix_kind if len(shape) == 2 else kinds.F32
        if len(shape) == 2 and shape[-1] % width:
            raise ValueError(f"{name} has rows of {shape[-1]} weights, expected a multiple of {width} for "
                             f"{dtype}; take another --dtype")
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind_of[name]]
        num_bytes[name] = math.prod(shape) // block * block_bytes
    check_disk(path.name, sum(num_bytes.values()), path.parent)
    with complete(path) as file:
        writer = gguf.GGUFWriter(file.name, "llama")
        try:
            describe_model(writer, args)
            if vocabulary is None:
                writer.add_tokenizer_model("no_vocab")
            else:
                describe_vocabulary(writer, args.vocab_size, *vocabulary)
            names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)  # It knows Meta's, too.
            for name, shape in shapes.items():
                theirs = names.get_name(name, [".weight"])
                writer.add_tensor_info(theirs, shape, np.float32, num_bytes[name], kind_of[name])
            factors = rope_factors(args, frequencies)
            if args.use_scaled_rope:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors:
                writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), kind_of[name]))
            if args.use_scaled_rope:
                writer.write_tensor_data(factors)
        finally:
            writer.close()


def describe_model(writer, args):
    """Adds the shape of a Llama to a file. Rows of wq and wk stay, as llama.cpp's RoPE is Meta's."""
    settings = dict(
        vocab_size=args.vocab_size, context_length=args.max_seq_len, embedding_length=args.dim,
        block_count=args.n_layers, feed_forward_length=args.hidden_dim, head_count=args.n_heads,
        head_count_kv=args.n_kv_heads, key_length=args.head_dim, value_length=args.head_dim,
        rope_freq_base=args.rope_theta, rope_dimension_count=args.head_dim, layer_norm_rms_eps=args.norm_eps)
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)


def rope_factors(args, frequencies):
    """What llama.cpp divides its own, unscaled RoPE frequencies by, (D/2,) float32."""
    unscaled = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    return (unscaled / frequencies).numpy()

# -----------------------------------------------------------------------------
# The vocabulary


def describe_vocabulary(writer, vocab_size, tokenizer, path):
    """Adds a vocabulary to a file, so that llama.cpp has the ids of Tokenizer.encode for every text.

    vocab_size: rows of the embedding; those that have no token are marked as unused. path: of a
    tokenizer.json of the Tokenizer's vocabulary, which may have a chat template beside it. ValueError names
    what llama.cpp doesn't have.
    """
    from gguf import TokenType
    data = read_json(path)
    splitter = splitter_name(data, path)
    check_merges(data, splitter, path)
    texts = [f"[unused {i}]" for i in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for text, i in data["model"]["vocab"].items():
        texts[i] = text
        kinds[i] = TokenType.NORMAL
    for token in data.get("added_tokens") or []:  # Of these, only white space is read in every text.
        texts[token["id"]] = token["content"]
        is_special = token["content"] in tokenizer.special_tokens
        kinds[token["id"]] = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for every byte-level BPE
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)
    config = path.with_name("tokenizer_config.json")
    config = read_json(config) if config.exists() else {}
    bos = config.get("bos_token")  # a chat template may use it also where no text begins with it
    bos = bos["content"] if isinstance(bos, dict) else bos
    bos_id = tokenizer.special_tokens.get(bos) if tokenizer.bos_id is None else tokenizer.bos_id
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    if found := read_template(path.parent, config):
        writer.add_chat_template(found[1])
    places = writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id
    if len(tokenizer.stop_tokens) > len(places):
        raise ValueError(f"{path}: found {len(tokenizer.stop_tokens)} tokens that end a text, expected at "
                         f"most {len(places)} for GGUF; name fewer in generation_config.json")
    for add, stop_token in zip(places, tokenizer.stop_tokens, strict=False):
        add(stop_token)


def splitters():
    """llama.cpp's name -> what a tokenizer.json calls the same way of cutting a text into words."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False}
    llama3 = json.loads(word_splitter().__getstate__())
    split, _ = llama3["pretokenizers"]
    qwen2 = json.loads(json.dumps(split).replace("{1,3}", ""))  # Each digit is a word of its own.
    bytes_only = {**byte_level, "use_regex": False}
    words = {**byte_level, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {"llama-bpe": [split, bytes_only], "qwen2": [qwen2, bytes_only], "smollm": [digits, words],
            "gpt-2": [words]}


def splitter_name(data, path):
    """llama.cpp's name for how a tokenizer.json cuts a text; ValueError where it has none."""
    splitter = data["pre_tokenizer"]
    found = splitter.get("pretokenizers", [splitter])
    # Only offsets depend on trim_offsets. Splits are written in two ways, of one meaning.
    found = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in found]
    for name, parts in splitters().items():
        if found == parts and not data.get("normalizer"):
            return name
    kinds = [part["type"] for part in found]
    if data.get("normalizer"):
        kinds.insert(0, data["normalizer"]["type"])
    raise ValueError(f"{path}: llama.cpp has no name for this way of cutting a text into words, "
                     f"{' and '.join(kinds)}; expected one of {', '.join(splitters())}")


def check_merges(data, splitter, path):
    """Raises ValueError if llama.cpp would merge otherwise.

    It takes a word that is a token as it is where texts are cut as by Llama 3, and always merges elsewhere.
    The two differ only for tokens that no merges lead to.
    """
    model = data["model"]
    if bool(model.get("ignore_merges")) == (splitter == "llama-bpe"):
        return
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    bpe = BPE(models.BPE(model["vocab"], merges))
    added = {token["content"] for token in data.get("added_tokens") or []}
    for text, i in model["vocab"].items():
        if text not in added and bpe.encode(text, add_special_tokens=False).ids != [i]:
            raise ValueError(f"{path}: no merges lead to the token {text!r}, so that llama.cpp would read "
                             "other ids than the model has learned")
