"""Hugging Face's checkpoint folders to Meta's, which llama31.py reads, and back.

    python convert.py from_hf SRC DST
    python convert.py to_hf SRC DST

Tensors keep their bytes; plumbing/huggingface.py knows how their names and the order of rows differ.
"""

import base64
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as BPE

import llama31
from plumbing import cli
from plumbing.chat_template import read_template
from plumbing.checkpoint import merge_pieces, save_checkpoint, stored_dtype
from plumbing.fast import choose_dtype
from plumbing.files import complete_folder, read_json
from plumbing.huggingface import (
    FIELDS,
    INDEX,
    LLAMA,
    ROPE_FIELDS,
    SINGLE,
    open_pieces,
    read_config,
    reordered,
    tensor_names,
    write_json,
)
from plumbing.tokenizer_json import HuggingFaceVocabulary, copy_tokenizer
from tokenizer import BYTE_OF, SPECIAL_TOKENS, Tokenizer, find_tokenizer, read_vocabulary, word_splitter

# -----------------------------------------------------------------------------
# Weights


def whole_tensor(name, pieces, args, dtype):
    """The tensor of some pieces with its rows in Hugging Face's order; dtype None: its own."""
    tensor = reordered(name, merge_pieces(name, pieces), args, to_meta=False)
    return tensor.to(dtype or tensor.dtype)


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
        num_bytes = sum(piece.numel() * (dtype or piece.dtype).itemsize for piece in pieces[name])
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
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # The disk may be full.
            raise OSError(f"{path}: {error}") from None
        shutil.copymode(folder / "config.json", path)  # save_file lets only the owner read.
        weight_map |= dict.fromkeys(tensors, path.name)
        total_size += sum(t.nbytes for t in tensors.values())
    if len(groups) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})

# -----------------------------------------------------------------------------
# Configuration

def write_config(folder, args, dtype, ids):
    """Writes config.json and generation_config.json; ids: special tokens, which go into both."""
    rope = {"rope_type": "llama3", **{theirs: getattr(args, ours) for ours, theirs in ROPE_FIELDS.items()}}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], **LLAMA, **ids,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(args, ours) for ours, (theirs, _) in FIELDS.items()},
        "intermediate_size": args.hidden_dim, "rope_theta": args.rope_theta,
        "rope_scaling": rope if args.use_scaled_rope else None})

# -----------------------------------------------------------------------------
# Tokenizer

BOS = "<|begin_of_text|>"
# It gives the ids of Tokenizer.encode_dialog. Contents stay as they are, as in Meta's ChatFormat, so that a
# model sees in use what it saw in training; Meta's published template trims them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = {'tool': 'ipython', 'developer': 'system'}.get(message.role, message.role) %}"
    "<|start_header_id|>{{ role }}<|end_header_id|>\n\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}"
    "{% if message.tool_calls | length > 1 %}{{ raise_exception('several calls at a time') }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{% set function = call.function or call %}"
    """{"name": {{ function.name | tojson }}, "parameters": """
    "{{ function.arguments if function.arguments is string else function.arguments | tojson }}}{% endfor %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
# Other releases number the reserved tokens differently and give two of them names.
RESERVED = re.compile(r"<\|(reserved_special_token_\d+|step_id|image)\|>")


def write_tokenizer_model(source, path, vocab_size):
    """Writes the tokenizer.model of a tokenizer.json; ValueError if it isn't Llama 3's kind, or damaged."""
    data = read_json(source)
    try:
        model = data["model"]
        vocab = model["vocab"]
        added = {token["id"]: token["content"] for token in data["added_tokens"]}
        base = sorted((rank, token) for token, rank in vocab.items() if rank not in added)
        # A merge is written as ["a", "b"] or as "a b"; its rank is that of the token it makes.
        merged = [vocab["".join(merge).replace(" ", "")] for merge in model["merges"]]
        names = dict(zip(range(len(base), vocab_size), SPECIAL_TOKENS, strict=True))  # id -> name or None
        splitter = json.loads(word_splitter().__getstate__())
        is_bpe = model["type"] == "BPE" and not model.get("dropout") and merged == sorted(merged)
        splits_alike = data["normalizer"] is None and data["pre_tokenizer"] == splitter
        fits = is_bpe and splits_alike and added.keys() == names.keys()
        if fits:
            fits = all(added[i] == names[i] or RESERVED.fullmatch(added[i]) for i in names)
        if not fits:
            raise ValueError
        with open(path, "wb") as file:
            for rank, token in base:
                token = bytes(BYTE_OF[character] for character in token)
                file.write(b"%s %d\n" % (base64.b64encode(token), rank))
        Tokenizer(path)  # It checks the ranks, and that the vocabulary has every byte.
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{source} is not Llama 3's, or not of the model's {vocab_size} tokens") from None


def metas_tokenizer(src, folder, vocab_size):
    """The tokenizer's file for a checkpoint directory: a tokenizer.model, which is written into a folder.

    Where src has none of Llama 3's kind it is src's own tokenizer.json; None where that can't be read or
    isn't there. A line on standard error says what is left out.
    """
    source = src / "tokenizer.json"
    try:
        vocabulary = HuggingFaceVocabulary(str(source))
        vocabulary.check(vocab_size)
    except (ValueError, FileNotFoundError) as error:
        print(f"only weights are converted: {error}", file=sys.stderr)
        return None
    try:
        write_tokenizer_model(source, folder / "tokenizer.model", vocab_size)
        template = read_template(src, vocabulary.configs.get("tokenizer_config.json", {}))
        if template and template[1] != CHAT_TEMPLATE:
            print(f"{src}: its chat template is left out, as Meta's folders have Llama 3's format; "
                  f"--ckpt_dir {src} keeps it", file=sys.stderr)
        return folder / "tokenizer.model"
    except ValueError:
        return source


def write_tokenizer_json(folder, tokenizer, max_seq_len):
    """Writes tokenizer.json and tokenizer_config.json: the same ids, <|begin_of_text|> before a text."""
    character_of = {byte: character for character, byte in BYTE_OF.items()}
    ranks = {token: rank for rank, token in enumerate(read_vocabulary(tokenizer.model_path))}
    text = ["".join(character_of[byte] for byte in token) for token in ranks]
    merges = []  # tiktoken merges any pair that makes a token, lowest rank first, so all of them are listed
    for token in ranks:
        pairs = [(ranks.get(token[:cut]), ranks.get(token[cut:])) for cut in range(1, len(token))]
        merges += [(text[a], text[b]) for a, b in sorted(pair for pair in pairs if None not in pair)]
    bpe = BPE(models.BPE({token: rank for rank, token in enumerate(text)}, merges, ignore_merges=True))
    bpe.pre_tokenizer = word_splitter()
    bpe.decoder = decoders.ByteLevel()
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
    args = read_config(src, llama31.ModelArgs, llama31.PRESETS.values())
    model = llama31.Transformer.on_meta(args)
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    pieces, _ = open_pieces(src, args, shapes)
    state = {name: tensor.to(dtype or tensor.dtype) for name, [tensor] in pieces.items()}
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
                ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_tokens),
                       "pad_token_id": tokenizer.pad_id}
        write_config(part, args, dtype or stored_dtype(pieces), ids)
        write_tensors(part, args, pieces, max_file_bytes, dtype)


def refuse_existing(dst):
    if dst.exists():
        raise FileExistsError(f"{dst} exists; give the name of a new folder")


if __name__ == "__main__":
    cli.run({"from_hf": from_hf, "to_hf": to_hf}, default=None)
