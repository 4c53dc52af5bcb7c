"""Llama 3's tokenizer: byte-level BPE over a tokenizer.model file; tiktoken does the encoding."""

import base64
import os
import re

import tiktoken

SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")
NAMED_SPECIALS = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
                  7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}  # Llama 3.1's, by offset
NUM_SPECIALS = 256
MAX_CHARS = 400_000  # tiktoken panics on longer texts
MAX_RUN = re.compile(r"\S{1,25000}|\s{1,25000}")  # and crawls on longer runs of (non-)whitespace


def special_tokens():
    """The names of Llama 3.1's 256 special tokens, in the order of their ids."""
    reserved = iter(range(NUM_SPECIALS))
    names = (NAMED_SPECIALS.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(NUM_SPECIALS))
    return [f"<|{name}|>" for name in names]


def read_ranks(path):
    """{token bytes: rank} of a tokenizer.model; ValueError names the file and the line at fault."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; expected a Llama 3 tokenizer.model")
    ranks = {}
    with open(path, "rb") as f:
        for number, line in enumerate(f):
            try:
                token, rank = line.split()
                token, rank = base64.b64decode(token, validate=True), int(rank)
            except ValueError:
                raise ValueError(f"{path}: line {number + 1} is {line[:40]!r}; expected a token in base64 and its "
                                 "rank: not a tokenizer.model, or a damaged one") from None
            if rank != number or token in ranks:
                raise ValueError(f"{path}: line {number + 1} has rank {rank} or repeats a token; expected rank {number}")
            ranks[token] = rank
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{path}: {len(ranks)} tokens without the single byte {absent[0]}; expected all 256: truncated")
    return ranks


class Tokenizer:
    """Text to token ids and back, with the vocabulary of a tokenizer.model and Llama 3.1's special tokens after it."""

    def __init__(self, model_path):
        self.model_path = str(model_path)
        ranks = read_ranks(self.model_path)
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(special_tokens())}
        self.model = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                                       special_tokens=self.special_tokens)
        self.n_words = len(ranks) + NUM_SPECIALS
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.eot_id = self.special_tokens["<|eot_id|>"]
        self.eom_id = self.special_tokens["<|eom_id|>"]
        self.pad_id = self.special_tokens["<|finetune_right_pad_id|>"]
        self.stop_tokens = [self.eos_id, self.eot_id, self.eom_id]

    def encode(self, s, bos=False, eos=False, allowed_special=()):
        """The ids of a text; special tokens in it are ordinary text unless named in allowed_special (or "all")."""
        ids = [self.bos_id] if bos else []
        for piece in split_long_runs(s):
            allowed = allowed_special if allowed_special == "all" else set(allowed_special)
            ids += self.model.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids):
        """The text of token ids; bytes that are no UTF-8 become the replacement character."""
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(f"token id {i}; expected 0 to {self.n_words - 1}")
        return self.model.decode(list(ids))


def split_long_runs(s):
    """Pieces of s that tiktoken can take: cut where Meta's tokenizer cuts, so that the ids are the same."""
    for i in range(0, len(s), MAX_CHARS):
        chunk, start, run_start = s[i:i + MAX_CHARS], 0, 0
        for match in MAX_RUN.finditer(chunk):
            begin = match.start()
            if begin - run_start >= 25_000 and chunk[begin].isspace() == chunk[begin - 1].isspace():
                yield chunk[start:begin]
                start = begin
            run_start = begin
        yield chunk[start:]
