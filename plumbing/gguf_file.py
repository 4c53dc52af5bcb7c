"""llama.cpp's files, .gguf: a model's shape, its vocabulary and its weights in one file.

The format, and how llama.cpp names things, come from the gguf package, which is imported where it is needed.
Rows of wq and wk stay in Meta's order, for llama.cpp's RoPE, too, turns neighbours together.
"""

import os
from pathlib import Path

import numpy as np
import torch

from plumbing.files import check_disk, complete
from plumbing.meta_vocabulary import SPLIT_PATTERN
from plumbing.text_files import read_json

KINDS = "f32", "f16", "bf16", "q8_0"  # types of matrices
AT_ONCE = 2**22  # elements that are converted at a time
LARGEST_F16 = 65504


def choose_kind(dtype, stored):
    """One of KINDS, by its name; dtype None: that of stored, the torch.dtype in which weights are kept."""
    if dtype is None:
        return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(stored, "f32")
    if dtype not in KINDS:
        raise ValueError(f"dtype: found {dtype!r}, expected {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    return dtype


def import_gguf():
    """The gguf package, which only these files need."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError("found no gguf package to write with; pip install gguf") from error
    return gguf


def write_gguf(path, args, pieces, kind, frequencies, vocabulary=None, template=None, in_order=None):
    """Writes a file that appears when it is complete; some rows of a tensor are in memory at a time.

    args, pieces: a model's shape and open_pieces' tensors, which leave the dictionary. kind: one of KINDS,
    of the matrices; where it is q8_0, one whose rows 32 doesn't divide is f16, as llama.cpp makes it.
    frequencies: rope_frequencies(args). vocabulary: a HuggingFaceVocabulary; None: llama.cpp reads only ids.
    template: source of its chat template, or None. in_order: name and tensor -> the tensor with its rows in
    Meta's order; None: they are. ValueError: no such file can hold it.
    """
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)  # It knows Meta's names, too.

    def type_of(sizes):
        if len(sizes) == 1:
            return types.F32
        return types.F16 if kind == "q8_0" and sizes[-1] % 32 else types[kind.upper()]

    def num_bytes(sizes, chosen):
        return int(np.prod(gguf.quant_shape_to_byte_shape(sizes, chosen)))

    if args.tie_word_embeddings:
        del pieces["output.weight"]  # llama.cpp then takes the embedding.
    order = sorted(pieces)  # The layouts' own orders differ.
    tensors = {}  # llama.cpp's name -> (sizes, type)
    if args.use_scaled_rope:
        tensors["rope_freqs.weight"] = [len(frequencies)], types.F32
    for name in order:
        sizes = pieces[name].shape
        tensors[names.get_name(name, [".weight"])] = sizes, type_of(sizes)
    check_disk(path, sum(num_bytes(*entry) for entry in tensors.values()), Path(path).parent)
    with complete(path) as file:
        writer = gguf.GGUFWriter(file.name, "llama")
        add_shape(writer, args, kind)
        if vocabulary is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            add_vocabulary(writer, args.vocab_size, vocabulary, template)
        for name, (sizes, chosen) in tensors.items():
            writer.add_tensor_info(name, sizes, np.dtype("f4"), num_bytes(sizes, chosen), chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()

        def write(name, tensor):
            _, chosen = tensors[name]
            file.seek(0, os.SEEK_END)
            file.write(bytes(-file.tell() % writer.data_alignment))
            for rows in tensor.split(max(1, AT_ONCE // tensor[0].numel())):
                rows = rows.float()
                largest = rows.abs().max()
                if chosen == types.F16 and largest > LARGEST_F16:
                    raise ValueError(f"{name}: found {largest:.4g}, expected at most {LARGEST_F16}, as f16 "
                                     "holds no more; give another --dtype, such as bf16")
                file.write(gguf.quantize(rows.numpy(), chosen).tobytes())

        if args.use_scaled_rope:  # llama.cpp divides its own, unscaled frequencies by these.
            unscaled = args.rope_theta ** -(torch.arange(0, args.head_dim, 2).float() / args.head_dim)
            write("rope_freqs.weight", unscaled / frequencies)
        for name in order:
            tensor = pieces.pop(name).whole()
            write(names.get_name(name, [".weight"]), in_order(name, tensor) if in_order else tensor)
        file.write(bytes(-file.tell() % writer.data_alignment))


def add_shape(writer, args, kind):
    """Adds what llama.cpp has to know of a model's shape."""
    settings = dict(
        vocab_size=args.vocab_size, context_length=args.max_seq_len, embedding_length=args.dim,
        block_count=args.n_layers, feed_forward_length=args.hidden_dim, head_count=args.n_heads,
        head_count_kv=args.n_kv_heads, key_length=args.head_dim, value_length=args.head_dim,
        rope_freq_base=args.rope_theta, rope_dimension_count=args.head_dim, layer_norm_rms_eps=args.norm_eps,
        quantization_version=2, file_type={"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind])
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)

# -----------------------------------------------------------------------------
# Vocabulary


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


SINGLE_DIGITS = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# llama.cpp knows ways to cut texts, each by a name that also says whether a word that is a token skips the
# merges: (its name, whether it does, how tokenizer.json says the same).
PRE_TOKENIZERS = [
    ("llama-bpe", True, [split(SPLIT_PATTERN), byte_level(False)]),
    ("dbrx", False, [split(SPLIT_PATTERN), byte_level(False)]),
    ("qwen2", False, [split(SINGLE_DIGITS), byte_level(False)]),
    ("gpt-2", False, [byte_level(True)]),
    ("smollm", False, [{"type": "Digits", "individual_digits": True}, byte_level(True)]),
]
ABSENT = "dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"  # of a BPE model


def pre_tokenizer_name(path, data):
    """llama.cpp's name for the way in which a tokenizer.json cuts texts; ValueError if it has none."""
    found = data["pre_tokenizer"]
    parts = []
    for part in found.get("pretokenizers", [found]):
        part = {"use_regex": True} | part if part["type"] == "ByteLevel" else dict(part)
        part.pop("trim_offsets", None)  # It moves no token.
        parts.append(part)
    skips_merges = bool(data["model"].get("ignore_merges"))
    lacking = [f"{name} of its BPE" for name in ABSENT if data["model"].get(name)]
    if data.get("normalizer"):
        lacking.append(f"normalizer {data['normalizer'].get('type')}")
    for name, skips, known in PRE_TOKENIZERS:
        if (skips, known) == (skips_merges, parts) and not lacking:
            return name
    kinds = " and ".join(part["type"] for part in parts)
    merging = "with" if skips_merges else "without"
    what = ", ".join(lacking) or f"pre_tokenizer {kinds} ({parts[0]!s:.80}) {merging} ignore_merges"
    known = ", ".join(name for name, *_ in PRE_TOKENIZERS)
    raise ValueError(f"{path}: found {what}, expected what a GGUF file can name ({known}); run the model "
                     "with transformers or vLLM instead")


def add_vocabulary(writer, vocab_size, vocabulary, template):
    """Adds tokens, merges, special tokens and the chat template; ValueError: a file can't say them."""
    from gguf import TokenType
    data = read_json(Path(vocabulary.path))
    writer.add_tokenizer_model("gpt2")  # any byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(vocabulary.path, data))
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
    texts = data["model"]["vocab"] | added
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # A model may have more rows than there are tokens.
    kinds = [TokenType.UNUSED] * vocab_size
    for text, i in texts.items():
        tokens[i] = text
        kinds[i] = TokenType.NORMAL
        if text in vocabulary.special_tokens:
            kinds[i] = TokenType.CONTROL
        elif text in added:  # It is white space, which llama.cpp, too, finds before it cuts words.
            kinds[i] = TokenType.USER_DEFINED
    if len(set(tokens)) < vocab_size:
        raise ValueError(f"{vocabulary.path}: found a token named as an unused one would be, like [PAD1], "
                         "expected none, as llama.cpp refuses a name that two tokens have; rename it")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    add_roles(writer, vocabulary)
    if template is not None:
        writer.add_chat_template(template)


def add_roles(writer, vocabulary):
    """Adds the ids that begin and end texts, turns and messages."""
    eom_id = vocabulary.special_tokens.get("<|eom_id|>")
    stops = vocabulary.stop_tokens
    if not 1 <= len(stops) <= 3:
        raise ValueError(f"{vocabulary.path}: found {len(stops)} stop tokens, expected 1 to 3, as a GGUF "
                         "file names one each for texts, turns and messages; set eos_token_id in "
                         "generation_config.json")
    others = sorted(stops[1:], key=lambda i: i == eom_id)
    for role, i in zip(("eos", "eot", "eom"), [stops[0], *others], strict=False):
        getattr(writer, f"add_{role}_token_id")(i)
    # Where nothing begins a text, templates may still write a BOS. Without any, llama.cpp would take id 11.
    bos = [vocabulary.bos_id] if vocabulary.bos_id is not None else []
    bos += vocabulary.named("tokenizer_config.json", "bos")
    writer.add_bos_token_id([*bos, stops[0]][0])
    for i in vocabulary.named("tokenizer_config.json", "pad")[:1]:
        writer.add_pad_token_id(i)
    writer.add_add_bos_token(vocabulary.bos_id is not None)
    writer.add_add_eos_token(False)
