"""Llama 3's tokenizer: text to token ids and back, with Meta's vocabulary or a small one trained here.

A pattern cuts text into words; within a word, neighbouring byte strings merge, lowest rank first, while the
result is in the vocabulary (byte-pair encoding; tiktoken does it). tokenizer.model holds one `base64-token
rank` per line; Llama 3.1's 256 special tokens are not in the file, their ids follow the last rank.
"""

import base64
import operator
import os
import re
from collections.abc import Collection, Iterable

import tiktoken

SPLIT_PATTERN = "|".join([            # Llama 3's, alternative by alternative
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",      # letters, with one space or sign before them
    r"\p{N}{1,3}",                    # digits, at most three at a time
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",     # signs, with the line breaks after them
    r"\s*[\r\n]+",                    # line breaks, with the space before them
    r"\s+(?!\S)|\s+",                 # other space; its last character goes to a word that follows
])
# In id order, None a reserved slot: as published with Llama 3.1. (Meta's later code gives two reserved slots
# names, <|step_id|> and <|image|>, and so numbers the reserved ones after them differently; ids agree.)
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", None, None, "<|finetune_right_pad_id|>", None,
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
                  *[None] * 245]

# Meta's guard: tiktoken fails on much longer texts, and gets slow on longer unbroken runs.
MAX_CHARS = 400_000
MAX_RUN = 25_000  # characters in a row that are all whitespace, or all not
RUN = re.compile(rf"\s{{1,{MAX_RUN}}}|\S{{1,{MAX_RUN}}}")

REMEDY = "expected Meta's tokenizer.model (original/tokenizer.model in downloads from Hugging Face)"
FOREIGN = {b"<unk>": "Llama 2's SentencePiece model", b"<": "an HTML page", b"{": "JSON, like a tokenizer.json",
           b"git-lfs": "a git-lfs pointer (`git lfs pull` gets the file)"}  # bytes that base64 doesn't use


class Tokenizer:
    """A vocabulary read from a tokenizer.model file. Errors: see read_vocabulary.

    model_path: that file. n_words: the number of ids. special_tokens: name -> id. stop_tokens: ids that end a
    text, turn or message. byte_lengths: UTF-8 bytes per id, 0 for special tokens (for bits per byte).
    """

    def __init__(self, model_path: str | os.PathLike):
        self.model_path = os.fspath(model_path)
        base = read_vocabulary(self.model_path)
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(len(SPECIAL_TOKENS)))
        self.special_tokens = {name or next(reserved): i for i, name in enumerate(SPECIAL_TOKENS, len(base))}
        self.n_words = len(base) + len(self.special_tokens)
        self.bos_id = self.special_tokens["<|begin_of_text|>"]
        self.eos_id = self.special_tokens["<|end_of_text|>"]
        self.eot_id = self.special_tokens["<|eot_id|>"]  # end of turn
        self.eom_id = self.special_tokens["<|eom_id|>"]  # end of message: a tool's answer is expected
        self.pad_id = self.special_tokens["<|finetune_right_pad_id|>"]
        self.stop_tokens = [self.eos_id, self.eot_id, self.eom_id]
        self.byte_lengths = [len(token) for token in base] + [0] * len(self.special_tokens)
        self._bytes = base + [name.encode() for name in self.special_tokens]
        self._encoding = tiktoken.Encoding(
            os.path.basename(self.model_path), pat_str=SPLIT_PATTERN, special_tokens=self.special_tokens,
            mergeable_ranks={token: rank for rank, token in enumerate(base)})

    def encode(self, s: str, bos: bool = False, eos: bool = False,
               allowed_special: str | Collection[str] = ()) -> list[int]:
        """Token ids of a text, the same as Meta's.

        bos, eos: put <|begin_of_text|> before, <|end_of_text|> after. allowed_special: names (or "all") that
        stand for their special token where s spells them out; all others are ordinary characters there, so
        that no text can forge the end of a turn. Lone surrogates, which UTF-8 lacks, count as U+FFFD.
        ValueError: s is not a str, or a name is unknown.
        """
        if not isinstance(s, str):
            raise ValueError(f"encode: expected one str, found {type(s).__name__} {s!r:.60}")
        names = [allowed_special] if isinstance(allowed_special, str) else allowed_special
        names = set(self.special_tokens if allowed_special == "all" else names)
        if unknown := names - self.special_tokens.keys():
            raise ValueError(f"encode: no special token {unknown}; Tokenizer.special_tokens has the names")
        tokens = [self.bos_id] if bos else []
        for piece in split_long(s):
            tokens += self._encoding.encode(piece, allowed_special=names, disallowed_special=())
        return tokens + [self.eos_id] if eos else tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens by name; U+FFFD for what isn't UTF-8. Errors: see decode_bytes."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids. A token may end inside a character: to stream, join bytes before decoding.

        ValueError: an id outside 0 .. n_words - 1, or not a sequence of integers.
        """
        try:
            ids = list(map(operator.index, ids))
        except TypeError as error:
            raise ValueError(f"expected a sequence of integer ids, found {ids!r:.60} ({error})") from None
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(f"token id {i}: expected 0 .. {self.n_words - 1}, as in {self.model_path}")
        return b"".join([self._bytes[i] for i in ids])


def split_long(text):
    """Yields text in the pieces that Meta encodes one by one: cut at every MAX_CHARS, and in runs at MAX_RUN."""
    for start in range(0, len(text), MAX_CHARS):
        chunk, begin = text[start:start + MAX_CHARS], 0
        for run in RUN.finditer(chunk) if len(chunk) > MAX_RUN else ():
            end = run.end()
            if end - run.start() == MAX_RUN and chunk[end - 1].isspace() == chunk[end:end + 1].isspace():
                yield chunk[begin:end]
                begin = end
        yield chunk[begin:]


def read_vocabulary(path: str) -> list[bytes]:
    """Tokens of a tokenizer.model in rank order. FileNotFoundError: no file. ValueError: another or damaged one."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: found {'a folder' if os.path.isdir(path) else 'no file'}, {REMEDY}")
    with open(path, "rb") as file:
        head = file.read(64)
        for sign, what in FOREIGN.items():
            if sign in head:
                raise ValueError(f"{path}: found {what}, {REMEDY}")
        file.seek(0)
        ranks = {}
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                token = base64.b64decode(token, validate=True)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: found {line[:40]!r}, cut short or not `base64 rank` "
                                 f"({error}), {REMEDY}") from None
            if rank != b"%d" % len(ranks):
                raise ValueError(f"{path}, line {number}: found rank {rank[:40].decode('ascii', 'replace')} in "
                                 f"place of {len(ranks)}, a line is cut, missing or moved, {REMEDY}")
            if token in ranks:
                raise ValueError(f"{path}, line {number}: found {token} again (rank {ranks[token]}), {REMEDY}")
            ranks[token] = len(ranks)
    if absent := [i for i in range(256) if bytes([i]) not in ranks]:
        raise ValueError(f"{path}: found {len(ranks)} tokens, but not {len(absent)} of the 256 single bytes "
                         f"(first: {absent[0]:#04x}), {REMEDY}")
    return list(ranks)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Trains a byte-level BPE vocabulary, split by Llama 3's pattern, and writes it to path as a tokenizer.model.

    vocab_size: n_words, of 256 bytes, then merges as found, then 256 special tokens. The same texts give the same
    file, which appears when complete. ValueError: vocab_size below 512, texts that aren't str or yield fewer merges.
    """
    # imported here because sampling and finetuning do without this package
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as BPE

    smallest = 256 + len(SPECIAL_TOKENS)
    if not isinstance(vocab_size, int) or vocab_size < smallest:
        raise ValueError(f"vocab_size: found {vocab_size!r}, expected {smallest} (bytes and special tokens) or more")
    if isinstance(texts, str):
        raise ValueError("texts: found one str, expected a sequence of them")

    def checked():
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"texts: found {type(text).__name__} {text!r:.60}, expected str")
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates, as encode

    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.train_from_iterator(checked(), trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    vocab = bpe.get_vocab()
    if (most := len(vocab) + len(SPECIAL_TOKENS)) < vocab_size:
        raise ValueError(f"vocab_size: found {vocab_size}, but the text has pairs to merge (seen twice or more) for "
                         f"{most} only; ask for {most} or give more text")
    # the library writes a byte as one character: itself if printable in Latin-1, the others as 256, 257, ...
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = printable + [i for i in range(256) if i not in printable]
    byte_of = {chr(i if n < len(printable) else 256 + n - len(printable)): i for n, i in enumerate(characters)}
    path = os.fspath(path)
    with open(f"{path}.part", "wb") as file:
        for rank, token in enumerate(sorted(vocab, key=vocab.get)):
            file.write(b"%s %d\n" % (base64.b64encode(bytes(byte_of[c] for c in token)), rank))
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.part", path)
    return Tokenizer(path)
