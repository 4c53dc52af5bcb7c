"""Meta's tokenizer.model: a vocabulary of byte strings by rank, Llama 3's pattern and its special tokens.

See tokenizer.py for how these make a text tokens.
"""

import base64
import itertools
import os
import re
from collections.abc import Collection, Iterator

import tiktoken

SPLIT_PATTERN = "|".join([            # Llama 3's pattern, one alternative a line
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",      # letters, with one space or sign before them
    r"\p{N}{1,3}",                    # digits, at most three at a time
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",     # signs, with the line breaks after them
    r"\s*[\r\n]+",                    # line breaks, with the space before them
    r"\s+(?!\S)|\s+",                 # other space; its last character goes to a word that follows
])
# Llama 3.1's special tokens in the order of their ids; None is a reserved slot.
# Meta's later code gives two slots names, <|step_id|> and <|image|>: other numbers, but no other ids.
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", None, None, "<|finetune_right_pad_id|>", None,
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
                  *[None] * 245]
RESERVED = (f"<|reserved_special_token_{i}|>" for i in itertools.count())
SPECIAL_NAMES = [name or next(RESERVED) for name in SPECIAL_TOKENS]
SPELLED = re.compile("|".join(map(re.escape, SPECIAL_NAMES)))  # the name of one of them in a text
CHAT_TOKENS = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
STOPPING = "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"  # They end a text, a turn, and a message to a tool.

# Meta cuts longer texts, as we do: tiktoken fails on much longer ones, and is slow on longer unbroken runs.
MAX_CHARS = 400_000
MAX_RUN = 25_000  # A run is a row of characters that are all white space, or all not.
RUN = re.compile(rf"\s{{1,{MAX_RUN}}}|\S{{1,{MAX_RUN}}}")

REMEDY = ("expected Meta's tokenizer.model; fetch it (Hugging Face: original/tokenizer.model), or name "
          "another vocabulary by --tokenizer_path")
MISTAKEN = {  # the beginning of a file that is often taken for a tokenizer.model -> what that file is
    b"version https://git-lfs": "a git-lfs pointer, which git lfs pull replaces",
    b"<": "a web page, as servers send instead of a file",
    b"{": "JSON; Hugging Face's is named tokenizer.json",
    b"\n": "a SentencePiece model, such as Llama 2's",
}


class MetaVocabulary:
    """Meta's tokenizer.model: byte strings by rank, and SPECIAL_NAMES, whose ids follow the last rank."""

    cuts_at_spaces = True
    template = None  # Dialogs are in Llama 3's format.

    def __init__(self, path: str) -> None:
        self.path = path
        base = read_vocabulary(path)
        self.special_tokens = {name: i for i, name in enumerate(SPECIAL_NAMES, len(base))}
        self.token_bytes = base + [name.encode() for name in SPECIAL_NAMES]
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.stop_tokens = [self.special_tokens[name] for name in STOPPING]
        self.encoding = tiktoken.Encoding(
            os.path.basename(path), pat_str=SPLIT_PATTERN, special_tokens=self.special_tokens,
            mergeable_ranks={token: rank for rank, token in enumerate(base)})

    def check(self, vocab_size: int) -> None:
        """See Tokenizer.check_vocabulary."""
        if len(self.token_bytes) != vocab_size:
            raise ValueError(f"{self.path} has {len(self.token_bytes)} tokens, the model {vocab_size}; give "
                             "the tokenizer.model that the model was trained with")

    def encode(self, s: str, names: Collection[str] = ()) -> list[int]:
        """Token ids of a text in which those special tokens are read."""
        tokens = []
        for piece in split_long(s):
            tokens += self.encoding.encode(piece, allowed_special=set(names), disallowed_special=())
        return tokens

    def encode_plain(self, s: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without special tokens, and how many whole characters precede each."""
        ids = self.encode(s)
        begins = []
        at = 0  # characters that have begun
        for token in map(self.token_bytes.__getitem__, ids):
            begins.append(at - in_character(token[0]))
            at += sum(not in_character(byte) for byte in token)
        return ids, begins


def in_character(byte: int) -> bool:
    """Whether a byte of UTF-8 goes on with a character that an earlier one has begun."""
    return byte & 0xC0 == 0x80


def split_long(text: str) -> Iterator[str]:
    """Yields the pieces that Meta encodes one by one: cut at every MAX_CHARS, and runs at every MAX_RUN."""
    for start in range(0, len(text), MAX_CHARS):
        chunk = text[start:start + MAX_CHARS]
        begin = 0
        for run in RUN.finditer(chunk) if len(chunk) > MAX_RUN else ():
            end = run.end()
            goes_on = end < len(chunk) and chunk[end].isspace() == chunk[end - 1].isspace()
            if goes_on and end - run.start() == MAX_RUN:
                yield chunk[begin:end]
                begin = end
        yield chunk[begin:]


def read_vocabulary(path: str) -> list[bytes]:
    """Tokens of a tokenizer.model in rank order.

    FileNotFoundError: there is no such file. ValueError: it is damaged or another kind of file.
    """
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise FileNotFoundError(f"{path}: found a folder, expected a tokenizer.model or tokenizer.json, "
                                    "such as one in it")
        raise FileNotFoundError(f"{path}: found nothing, {REMEDY}")
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                token = base64.b64decode(token, validate=True)
                if rank != b"%d" % len(ranks):
                    raise ValueError(f"expected rank {len(ranks)}")
                if token in ranks:
                    raise ValueError(f"{token} has rank {ranks[token]} already")
            except ValueError as error:
                found = f"no `base64-token rank`, or a damaged one ({error})"
                for head, kind in MISTAKEN.items():
                    if number == 1 and line.startswith(head):
                        found = kind
                raise ValueError(f"{path}, line {number}: found {line[:40]!r}, {found}; {REMEDY}") from None
            ranks[token] = len(ranks)
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"{path}: found {len(ranks)} tokens, without {len(absent)} of the 256 single bytes "
                         f"({absent[0]:#04x} first), cut short?; {REMEDY}")
    return list(ranks)
