"""The vocabulary of a folder in another layout's files: Meta's, Hugging Face's, or llama.cpp's."""

import base64
import json
import re
import sys

from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as BPE

from plumbing.chat_template import read_template
from plumbing.meta_vocabulary import CHAT_TOKENS, SPECIAL_TOKENS, read_vocabulary
from plumbing.text_files import read_json, write_json
from plumbing.tokenizer_json import BYTE_OF, HuggingFaceVocabulary, word_splitter
from tokenizer import Tokenizer, find_tokenizer

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


def ids_of(tokenizer):
    """The special ids of one of Meta's tokenizers, as generation_config.json has them."""
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_tokens),
            "pad_token_id": tokenizer.pad_id}


def full_vocabulary(src, folder, args):
    """(HuggingFaceVocabulary, template's source or None) of a checkpoint directory of either kind.

    folder: takes the tokenizer.json of one of Meta's. FileNotFoundError: there is no tokenizer. ValueError:
    it doesn't fit.
    """
    path = find_tokenizer(src)
    if not path.exists():
        raise FileNotFoundError(f"{src}: found no tokenizer.model or tokenizer.json, expected one, as "
                                "llama.cpp has no other; put the model's beside the weights")
    tokenizer = Tokenizer(path)
    tokenizer.check_vocabulary(args.vocab_size)
    if path.name == "tokenizer.model":
        write_tokenizer_json(folder, tokenizer, args.max_seq_len)
        write_json(folder / "generation_config.json", ids_of(tokenizer))
        path = folder / "tokenizer.json"
    vocabulary = HuggingFaceVocabulary(str(path))
    template = read_template(path.parent, vocabulary.configs.get("tokenizer_config.json", {}))
    if template is None and vocabulary.special_tokens.keys() >= set(CHAT_TOKENS):
        return vocabulary, CHAT_TEMPLATE  # Such dialogs are in Llama 3's format here, too.
    return vocabulary, template and template[1]
