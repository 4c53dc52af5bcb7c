"""Llama 3's tokenizer: text to token ids and back, with Meta's vocabulary or a small one trained here.

A pattern cuts text into words. Within a word, neighbouring byte strings merge, lowest rank first, as long as
the result is in the vocabulary: this is byte-pair encoding, which tiktoken computes. tokenizer.model holds
one `base64-token rank` per line. Llama 3.1's 256 special tokens are not in the file; their ids follow the
last rank. Hugging Face's folders have all of it, for any vocabulary, in tokenizer.json, which is read by
plumbing/tokenizer_json.py.
"""

import base64
import codecs
import contextlib
import itertools
import json
import operator
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken

from plumbing.files import complete

SPLIT_PATTERN = "|".join([            # Llama 3's pattern, one alternative a line
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # English contractions
    r"[^\r\n\p{L}\p{N}]?\p{L}+",      # letters, with one space or sign before them
    r"\p{N}{1,3}",                    # digits, at most three at a time
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",     # signs, with the line breaks after them
    r"\s*[\r\n]+",                    # line breaks, with the space before them
    r"\s+(?!\S)|\s+",                 # other space; its last character goes to a word that follows
])
# Llama 3.1's special tokens in the order of their ids; None is a reserved slot. (Meta's later code names two
# of the slots, <|step_id|> and <|image|>, so its reserved tokens have other numbers, but no id differs.)
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", None, None, "<|finetune_right_pad_id|>", None,
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
                  *[None] * 245]
RESERVED = (f"<|reserved_special_token_{i}|>" for i in itertools.count())
SPECIAL_NAMES = [name or next(RESERVED) for name in SPECIAL_TOKENS]
SPELLED = re.compile("|".join(map(re.escape, SPECIAL_NAMES)))  # the name of one of them in a text
# A message's role -> what the header of the message says. Files have two names for a tool's answer and,
# since newer models of OpenAI, two for the system prompt.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "ipython",
         "ipython": "ipython", "developer": "system"}
STOPPING = "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"  # They end a text, a turn, and a message to a tool.
LEARNED = "weight", "train", "training"  # Keys by which 0 or false keeps a message from being learned.
BESIDE_TEXT = "function_call", "image", "images", "audio", "video", "videos"  # Keys of what would be lost.

# Meta cuts longer texts, as we do: tiktoken fails on much longer ones, and is slow on longer unbroken runs.
MAX_CHARS = 400_000
MAX_RUN = 25_000  # A run is a row of characters that are all white space, or all not.
RUN = re.compile(rf"\s{{1,{MAX_RUN}}}|\S{{1,{MAX_RUN}}}")

REMEDY = "expected Meta's tokenizer.model; fetch it (Hugging Face: original/tokenizer.model) or fix the path"
MISTAKEN = {  # the beginning of a file that is often taken for a tokenizer.model -> what that file is
    b"version https://git-lfs": "a git-lfs pointer, which git lfs pull replaces",
    b"<": "a web page, as servers send instead of a file",
    b"{": "JSON; Hugging Face's is named tokenizer.json",
    b"\n": "a SentencePiece model, such as Llama 2's",
}


class Tokenizer:
    """A vocabulary, read from a tokenizer.model or, where the name ends in .json, from a tokenizer.json.

    Errors: see read_vocabulary, and HuggingFaceVocabulary in plumbing/tokenizer_json.py.

    model_path: the path of that file. n_words: how many ids there are. special_tokens: name -> id, of all
    that stand for no text. stop_tokens: the ids that end a text, a turn or a message. byte_lengths: how many
    bytes the token of each id has, 0 for a special token, which is what bits per byte need. spelled: finds
    the name of a special token in a text. A vocabulary of a tokenizer.json may lack any of these:
    bos_id: begins a text. eos_id: ends it. eot_id: ends a turn. eom_id: ends a message that a tool has to
    answer. pad_id. mark_id: only ever begins a document; where there is none, documents have to be marked.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        self.model_path = os.fspath(model_path)
        is_json = self.model_path.endswith(".json")
        if is_json:
            from plumbing.tokenizer_json import HuggingFaceVocabulary  # It imports this file.
            vocabulary = HuggingFaceVocabulary(self.model_path)
        else:
            vocabulary = MetaVocabulary(self.model_path)
        self._vocabulary = vocabulary
        self._bytes = vocabulary.token_bytes
        self.n_words = len(self._bytes)
        self.special_tokens: dict[str, int] = vocabulary.special_tokens
        self.bos_id: int | None = vocabulary.bos_id
        self.stop_tokens: list[int] = vocabulary.stop_tokens
        self.eos_id = self.stop_tokens[0] if self.stop_tokens else None
        self.eot_id = self.special_tokens.get("<|eot_id|>")
        self.eom_id = self.special_tokens.get("<|eom_id|>")
        self.pad_id = self.special_tokens.get("<|finetune_right_pad_id|>")
        self.mark_id = None if is_json else self.bos_id  # Many models have their BOS in every message.
        self.spelled = names_pattern(self.special_tokens)
        # Whether a text may be cut before a space that touches no other white space: see plumbing/words.py.
        self.cuts_at_spaces: bool = vocabulary.cuts_at_spaces
        self.byte_lengths = [len(token) for token in self._bytes]
        for i in self.special_tokens.values():
            self.byte_lengths[i] = 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a model lacks token ids; one of Meta's has to have as many, not more."""
        self._vocabulary.check(vocab_size)

    def encode(self, s: str, bos: bool = False, eos: bool = False,
               allowed_special: str | Collection[str] = ()) -> list[int]:
        """Token ids of a text, the same as Meta's, or those of transformers for a tokenizer.json.

        bos, eos: whether bos_id comes before and eos_id after it, where there are such. allowed_special:
        names of special tokens, or "all", that become that token where s spells them out. Every other name
        is ordinary characters, so that no text can forge the end of a turn. Lone surrogates, which UTF-8
        lacks, become U+FFFD. ValueError: s is not a str, or a name is unknown.
        """
        if not isinstance(s, str):
            raise ValueError(f"encode: expected one str, found {type(s).__name__} {s!r:.60}")
        if allowed_special == "all":
            names = set(self.special_tokens)
        elif isinstance(allowed_special, str):
            names = {allowed_special}
        else:
            names = set(allowed_special)
        unknown = names - self.special_tokens.keys()
        if unknown:
            raise ValueError(f"encode: no special token {unknown}; Tokenizer.special_tokens has the names")
        tokens = self._vocabulary.encode(s, names)
        if bos and self.bos_id is not None:
            tokens.insert(0, self.bos_id)
        if eos and self.eos_id is not None:
            tokens.append(self.eos_id)
        return tokens

    def encode_dialog(self, dialog: Sequence[dict], generation_prompt: bool = True) -> list[int]:
        """Token ids of a dialog in Llama 3's chat format, the same as Meta's ChatFormat.

        dialog: messages {"role": one of ROLES, "content": str} in any order, or as read_message takes them;
        the content stays as it is, and nothing in it becomes a special token. generation_prompt: whether
        the header of an answer follows. ValueError: this is no such dialog, or the vocabulary is without a
        token of that format.
        """
        tokens = [self.chat_token("<|begin_of_text|>")]
        for message in read_dialog(dialog):
            tokens += self.encode_message(message)
        if generation_prompt:
            tokens += self.encode_header("assistant")
        return tokens

    def encode_message(self, message: dict) -> list[int]:
        """Token ids of one message of a dialog: header, content, <|eot_id|>. Errors: see read_message."""
        message = read_message(message)
        end = self.chat_token("<|eot_id|>")
        return [*self.encode_header(message["role"]), *self.encode(message["content"]), end]

    def encode_header(self, role: str) -> list[int]:
        """Token ids of the header that begins a message of a role. ValueError: there is no such role."""
        check_role(role)
        return [self.chat_token("<|start_header_id|>"), *self.encode(ROLES[role]),
                self.chat_token("<|end_header_id|>"), *self.encode("\n\n")]

    def chat_token(self, name: str) -> int:
        """The id of a special token of Llama 3's chat format; ValueError if the vocabulary lacks it."""
        if name not in self.special_tokens:
            raise ValueError(f"{self.model_path} has no {name}, expected the special tokens of Llama 3's "
                             "chat format; give texts instead of a dialog, or take another model")
        return self.special_tokens[name]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, with special tokens by name and U+FFFD for bytes that aren't UTF-8.

        Errors: see decode_bytes.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids. A token may end inside a character; TextStream decodes tokens one at a time.

        ValueError: an id is outside 0 .. n_words - 1, or ids is no sequence of integers.
        """
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError as error:
            raise ValueError(f"found {ids!r:.60}, expected a sequence of token ids ({error})") from None
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(f"found token id {i}, {self.model_path} has 0 .. {self.n_words - 1}")
        return b"".join([self._bytes[i] for i in ids])


class MetaVocabulary:
    """Meta's tokenizer.model: byte strings by rank, and SPECIAL_NAMES, whose ids follow the last rank."""

    cuts_at_spaces = True

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

    def encode(self, s: str, names: Collection[str]) -> list[int]:
        """Token ids of a text in which those special tokens are read."""
        tokens = []
        for piece in split_long(s):
            tokens += self.encoding.encode(piece, allowed_special=set(names), disallowed_special=())
        return tokens


def names_pattern(names: Iterable[str]) -> re.Pattern:
    """What finds names in a text, of several that begin alike the longest; nothing, if there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def find_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """The tokenizer's file of a folder, Meta's where it has both; tokenizer.model's path where neither."""
    meta = Path(folder, "tokenizer.model")
    other = Path(folder, "tokenizer.json")
    return other if other.exists() and not meta.exists() else meta


def read_dialog(dialog: Sequence[dict]) -> list[dict]:
    """The messages of a dialog, each as in read_message; ValueError names the message and its key."""
    if not isinstance(dialog, list | tuple):
        raise ValueError(f"found {type(dialog).__name__} {dialog!r:.60}, expected a list of messages")
    messages = []
    for number, message in enumerate(dialog):
        try:
            messages.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    return messages


def read_message(message: dict) -> dict:
    """A message as {"role": one of ROLES, "content": str}, with "weight": 0 if it is not to be learned.

    content: text, or a list of {"type": "text", "text": str}, which are joined. An assistant's tool_calls
    follow it as in read_tool_call, and then it may be None. One of LEARNED that is 0 keeps an assistant's
    message from being learned. Other keys are ignored. ValueError names the key.
    """
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(message, dict) or "role" not in message or not ("content" in message or calls):
        found = list(message) if isinstance(message, dict) else message
        raise ValueError(f"found message {found!r:.60}, expected a dict of role and content")
    role = message["role"]
    check_role(role)
    for key in BESIDE_TEXT:
        if message.get(key):
            raise ValueError(f"found {key} {message[key]!r:.60}, expected a message of text alone")
    content = message.get("content")
    if not (content is None and calls):
        content = read_content(content)
    if calls:
        if role != "assistant":
            raise ValueError(f"found tool_calls of role {role!r}, expected them of the assistant alone")
        content = (content or "") + read_tool_call(calls)
    read = {"role": role, "content": content}
    for key in LEARNED if role == "assistant" else ():
        weight = message.get(key)
        if weight is not None and weight not in (0, 1):
            raise ValueError(f"found {key} {weight!r:.60}, expected 0 or 1")
        if weight == 0:
            read["weight"] = 0
    return read


def check_role(role: object) -> None:
    """Raises ValueError unless a role, of any type as files have them, is one of ROLES."""
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"found role {role!r:.60}, expected one of {', '.join(ROLES)}")


def read_content(content: object) -> str:
    """The text of a message's content; ValueError if it isn't text, or parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"content: expected one str, found {type(content).__name__} {content!r:.60}; give "
                         "text, or a list of parts of text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"content: found a part of type {kind!r:.60}, expected parts of type 'text', "
                             "each with its text")
        texts.append(text)
    return "".join(texts)


def read_tool_call(calls: object) -> str:
    """The text with which Llama 3.1 calls a tool, as in its chat template; ValueError unless it is one call.

    calls: [{"function": {"name": str, "arguments": dict, or that as JSON}}], or the inner dict itself.
    """
    if not isinstance(calls, list) or len(calls) != 1:
        found = f"{len(calls)} calls" if isinstance(calls, list) else f"{calls!r:.60}"
        raise ValueError(f"tool_calls: found {found}, expected a list of one: Llama 3.1 calls one at a time")
    [call] = calls
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # Text that is no JSON is named below.
            arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(f"tool_calls: found {call!r:.60}, expected a function with a name and arguments")
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


def split_at_stop(text: str, stop: Sequence[str], final: bool) -> tuple[str, str, bool]:
    """Returns (text that can be shown now, text held back, whether a stop text was found).

    The stop text is in neither. Text is held back if it may be the beginning of a stop text, unless it is
    final. Of several stop texts the first to be complete counts, so that it doesn't matter how tokens cut
    the text.
    """
    found = []  # (end, begin) of each stop text in the text
    for s in stop:
        begin = text.find(s)
        if begin >= 0:
            found.append((begin + len(s), begin))
    if found:
        _, begin = min(found)
        return text[:begin], "", True
    held = 0
    for s in stop:
        for n in range(1, len(s)):
            if not final and text.endswith(s[:n]):
                held = max(held, n)
    shown = len(text) - held
    return text[:shown], text[shown:], False


class TextStream:
    """The text of a row while its tokens come; ended: whether its last token or a stop text has come."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.ended = False

    def push(self, token: int | None) -> str:
        """The further text that can be shown after a further token, or after the end of the row, None.

        A character that is spread over several tokens comes with the last of them.
        """
        if self.ended:
            return ""
        self.ended = token is None
        new = b"" if token is None else self.tokenizer.decode_bytes([token])
        text = self.held + self.decoder.decode(new, final=self.ended)
        shown, self.held, stopped = split_at_stop(text, self.stop, self.ended)
        self.ended = self.ended or stopped
        return shown


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
        found = "a folder" if os.path.isdir(path) else "nothing"
        raise FileNotFoundError(f"{path}: found {found}, {REMEDY}")
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


def byte_alphabet() -> dict[str, int]:
    """Character -> byte, as the tokenizers library and tokenizer.json write the bytes of a token.

    A byte that is printable in Latin-1 is written as that character, the others as characters 256, 257, …
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = byte_alphabet()


def word_splitter():
    """Llama 3's pattern as a pre-tokenizer of the tokenizers library, with bytes written as characters."""
    from tokenizers import Regex, pre_tokenizers
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]) -> Tokenizer:
    """Trains a byte-level BPE vocabulary, split by Llama 3's pattern, and saves it as a tokenizer.model.

    vocab_size: n_words, of which 256 are bytes and 256 special tokens. The same texts give the same file,
    which appears when it is complete. ValueError: vocab_size is too small, a text is not a str, or there is
    too little text for so many tokens.
    """
    # These are imported here because sampling and finetuning do without the package.
    from tokenizers import Tokenizer as BPE
    from tokenizers import models, pre_tokenizers, trainers

    specials = len(SPECIAL_TOKENS)
    if not isinstance(vocab_size, int) or vocab_size < 256 + specials:
        raise ValueError(f"found vocab_size {vocab_size!r}, expected an int of {256 + specials} or more")

    def pieces() -> Iterator[str]:
        for text in [texts] if isinstance(texts, str) else texts:
            if not isinstance(text, str):
                raise ValueError(f"found {type(text).__name__} {text!r:.60} among the texts, expected str")
            # Lone surrogates become U+FFFD, as in encode.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield from split_long(text)  # The trainer, too, takes minutes for a very long run.

    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = word_splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - specials,
        min_frequency=2,  # A pair that occurs once is likely to be chance.
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(pieces(), trainer)
    vocab = bpe.get_vocab()  # token, its bytes written as in BYTE_OF -> rank
    if len(vocab) + specials < vocab_size:
        raise ValueError(f"found text enough for a vocab_size of {len(vocab) + specials}, expected "
                         f"{vocab_size}: give more text or a smaller vocab_size")
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with complete(path) as file:
        for rank, characters in enumerate(sorted(vocab, key=vocab.__getitem__)):
            token = bytes(BYTE_OF[character] for character in characters)
            file.write(b"%s %d\n" % (base64.b64encode(token), rank))
    return Tokenizer(path)
