"""Llama 3's tokenizer: text to token ids and back, with Meta's vocabulary or a small one trained here.

A pattern cuts text into words. Within a word, neighbouring byte strings merge, lowest rank first, as long as
the result is in the vocabulary: this is byte-pair encoding, which tiktoken computes. tokenizer.model holds
one `base64-token rank` per line. Llama 3.1's 256 special tokens are not in the file; their ids follow the
last rank; plumbing/meta_vocabulary.py has all this. Hugging Face's folders have all of it, for any
vocabulary, in tokenizer.json, which is read by plumbing/tokenizer_json.py.
"""

import base64
import bisect
import codecs
import operator
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from plumbing.chat_template import Rendering, names_pattern, unmarked, well_formed
from plumbing.files import complete
from plumbing.messages import ROLES, read_dialog, text_of
from plumbing.meta_vocabulary import CHAT_TOKENS, SPECIAL_TOKENS, MetaVocabulary, split_long
from plumbing.tokenizer_json import BYTE_OF, HuggingFaceVocabulary, word_splitter


class Tokenizer:
    """A vocabulary, read from a tokenizer.model or, where the name ends in .json, from a tokenizer.json.

    Errors: see read_vocabulary in plumbing/meta_vocabulary.py, and HuggingFaceVocabulary in
    plumbing/tokenizer_json.py.

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

    def encode_dialog(self, dialog: Sequence[dict], generation_prompt: bool = True,
                      begun: Sequence[int] = ()) -> list[int]:
        """Token ids of a dialog's text, by the template of the vocabulary's folder or in Llama 3's format.

        dialog: messages {"role": one of ROLES, "content": str} in any order, or as read_message takes them;
        nothing in them becomes a special token. generation_prompt: whether what begins an answer follows.
        begun: ids of the dialog so far, which are kept as far as they spell the same text: a model's own
        tokens can be others than those of encode. ValueError: this is no such dialog, the template refuses
        it, or there is none and the vocabulary is without a token of Llama 3's format.
        """
        rendering = self.render(dialog, generation_prompt)
        text = unmarked(rendering.text)
        special = set(self.special_tokens.values())
        kept = list(begun)
        while not text.startswith(self.decode(kept)):
            kept.pop()
            while kept and kept[-1] not in special:  # Behind one, text is encoded apart from what precedes.
                kept.pop()
        ids, _ = self.encode_rendering(rendering, len(self.decode(kept)))
        return kept + ids

    def encode_answers(self, dialog: Sequence[dict],
                       learned: Iterable[int]) -> tuple[list[int], list[bool], int]:
        """Token ids of a dialog, whether each is a target, and how many answers have none.

        learned: the numbers of the messages whose words are targets, with the stop token behind them, as
        Rendering.answer finds them. A token that begins before the words is none. Errors: see encode_dialog.
        """
        rendering = self.render(dialog, generation_prompt=False)
        ids, begins = self.encode_rendering(rendering)
        is_target = [False] * len(ids)
        num_lost = 0
        stops = [name for name, i in self.special_tokens.items() if i in self.stop_tokens]
        for number in learned:
            found = rendering.answer(number, stops)
            if found is None:
                num_lost += 1
                continue
            begin, end = (bisect.bisect_left(begins, place) for place in found)
            is_target[begin:end] = [True] * (end - begin)
        return ids, is_target, num_lost

    def render(self, dialog: Sequence[dict], generation_prompt: bool) -> Rendering:
        """The text of a dialog. Errors: see encode_dialog."""
        messages = read_dialog(dialog)
        template = self._vocabulary.template
        if template is None:
            template = llama3_text
            messages = llama3_messages(messages)
            absent = [name for name in CHAT_TOKENS if name not in self.special_tokens]
            if absent:
                raise ValueError(f"{self.model_path} has no {absent[0]}, expected the special tokens of "
                                 "Llama 3's chat format, or a chat template beside it; give texts instead "
                                 "of a dialog, or take another model")
        return Rendering(template, self.special_tokens, messages, generation_prompt)

    def encode_rendering(self, rendering: Rendering, begin: int = 0) -> tuple[list[int], list[int]]:
        """Token ids of a text from so many characters on, and how many characters precede each token."""
        ids = []
        begins = []
        at = 0
        for number, piece in enumerate(rendering.pieces()):
            rest = piece[max(begin - at, 0):]
            at += len(piece)
            if number % 2 == 0:
                new, places = self._vocabulary.encode_plain(rest)
            elif rest:
                new, places = [self.special_tokens[piece]], [0]
            else:
                continue
            ids += new
            begins += [at - len(rest) + place for place in places]
        return ids, begins

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


def find_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """The tokenizer's file of a folder; tokenizer.model's path where it has none.

    Of both, tokenizer.json is taken in Hugging Face's folders, as theirs alone has what a finetune added;
    Meta's elsewhere.
    """
    meta = Path(folder, "tokenizer.model")
    other = Path(folder, "tokenizer.json")
    is_theirs = Path(folder, "config.json").exists() or not meta.exists()
    return other if other.exists() and is_theirs else meta


def open_tokenizer(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None,
                   vocab_size: int) -> Tokenizer | None:
    """The tokenizer at a path; path None: a model's folder's own, or None if it has none.

    A line on standard error says where the folder has another one. ValueError if it has more tokens than
    vocab_size, the model's; the other errors are Tokenizer's.
    """
    own = find_tokenizer(folder)
    if not path and not own.exists():
        return None
    tokenizer = Tokenizer(path or own)
    tokenizer.check_vocabulary(vocab_size)
    chosen = Path(path or own)
    is_beside_own = chosen != own and own.exists() and chosen.suffix == own.suffix
    if is_beside_own and chosen.read_bytes() != own.read_bytes():
        print(f"{path} is another vocabulary than {own}, which the model has; text is right only if the ids "
              "are the same", file=sys.stderr)
    return tokenizer


def llama3_messages(messages: Sequence[dict]) -> list[dict]:
    """Messages of role and content alone; ValueError if one calls several tools at a time."""
    for number, message in enumerate(messages):
        calls = message.get("tool_calls", ())
        if len(calls) > 1:
            raise ValueError(f"message {number}: tool_calls: found {len(calls)} calls, expected one: Llama "
                             "3.1 calls one at a time")
    return [{"role": message["role"], "content": text_of(message)} for message in messages]


def header(role: str) -> str:
    """What begins a message of a role in Llama 3's format."""
    return f"<|start_header_id|>{ROLES[role]}<|end_header_id|>\n\n"


def llama3_text(messages: Sequence[dict], generation_prompt: bool, now: object = None) -> str:
    """A dialog in Llama 3's chat format; the same as Meta's ChatFormat writes."""
    turns = [f"{header(message['role'])}{message['content']}<|eot_id|>" for message in messages]
    return "".join(["<|begin_of_text|>", *turns, header("assistant") if generation_prompt else ""])


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
            yield from split_long(well_formed(text))  # The trainer, too, takes minutes for a very long run.

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
