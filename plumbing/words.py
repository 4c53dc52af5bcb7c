"""Records, as plumbing/records.py has them, to tokens, as a .bin shard stores them."""

import re

import numpy as np

from plumbing import files
from plumbing.meta_vocabulary import MAX_CHARS
from plumbing.records import is_learned, texts_of

BETWEEN_WORDS = re.compile(r" (?=\S)(?<=\S )")  # a space that touches no other white space


class Words:
    """Encodes records to the bytes of uint32 tokens, quickly, because it remembers the tokens of each word.

    A text may be cut before every space that touches no other white space, because Llama 3's pattern joins
    such a space to what follows and never to what precedes. Only a text's first word has no such space. With
    another pattern, of which that isn't known, texts are encoded whole.

    special: whether special tokens that a story, prompt or completion spells are read as tokens. In a chat
    they never are, as they would forge turns.
    """

    def __init__(self, tokenizer, special=False):
        self.tokenizer = tokenizer
        self.special = special
        self.bos = tokenizer.encode("", bos=True)  # what begins a text: one token or none
        self.eos = tokenizer.encode("", eos=True)
        self.num_lost = 0  # answers of the dialogs so far of which the template leaves nothing to learn
        self.first = {}  # word -> bytes of its tokens
        self.later = {}  # word -> bytes of the tokens of a space and the word

    def encode(self, record):
        """<BOS> story <EOS>, where the story doesn't spell them; or encode_chat, or encode_completion."""
        if "messages" in record:
            return self.encode_chat(record["messages"])
        if "completion" in record:
            return self.encode_completion(record["prompt"], record["completion"])
        [text] = texts_of(record)
        if self.reads_special(text):
            tokens = [as_bytes(self.encode_text(self.without_eos(self.without_bos(text))))]
        elif not self.tokenizer.cuts_at_spaces:
            tokens = [as_bytes(self.encode_text(text))]
        elif not text or len(text) > MAX_CHARS:  # The tokenizer cuts a longer text, even within a word.
            tokens = [as_bytes(self.encode_text(text))]
        else:  # The regular expression is slower and needed only for texts with double spaces and the like.
            tokens = self.look_up(text.split(" ")) or self.look_up(BETWEEN_WORDS.split(text))
        return b"".join([as_bytes(self.bos), *tokens, as_bytes(self.eos)])

    def look_up(self, words):
        """The bytes of each word's tokens; None if the text must not be cut there."""
        tokens = [self.first.get(words[0]), *map(self.later.get, words[1:])]
        if all(tokens):
            return tokens
        for i, word in enumerate(words):
            if tokens[i]:
                continue
            if not word or word[0].isspace() or word[-1].isspace():
                return None
            memory = self.later if i else self.first
            tokens[i] = memory.get(word)  # The loop has learned it if the text has it twice.
            if not tokens[i]:
                tokens[i] = as_bytes(self.tokenizer.encode(f" {word}" if i else word))
                if len(word) < 32 and len(self.first) + len(self.later) < 2**17:  # at most 30 MB
                    memory[word] = tokens[i]
        return tokens

    def reads_special(self, text):
        """Whether a text spells special tokens that are read as tokens."""
        return self.special and self.tokenizer.spelled.search(text) is not None

    def encode_text(self, text):
        """The token ids of a whole text."""
        return self.tokenizer.encode(text, allowed_special="all" if self.special else ())

    def encode_chat(self, messages):
        """A dialog, whose targets are the words of learned messages and the stop tokens after them."""
        learned = [number for number, message in enumerate(messages) if is_learned(message)]
        ids, is_target, num_lost = self.tokenizer.encode_answers(messages, learned)
        self.num_lost += num_lost
        return as_bytes(np.where(is_target, ids, np.bitwise_or(ids, files.MASKED)))

    def encode_completion(self, prompt, completion):
        """<BOS> prompt completion <EOS>, of which the completion and <EOS> are targets.

        Prompt and completion are encoded apart, because a prompt that is sampled from is encoded alone.
        """
        if self.special:
            prompt = self.without_bos(prompt)
            completion = self.without_eos(completion)
        masked = self.bos + self.encode_text(prompt)
        learned = self.encode_text(completion) + self.eos
        return as_bytes([i | files.MASKED for i in masked] + learned)

    def without_bos(self, text):
        """A text that may spell <BOS>, which is put before it anyway."""
        return text.removeprefix(self.tokenizer.decode(self.bos))

    def without_eos(self, text):
        """A text that may spell <EOS>, which is put behind it anyway."""
        return text.removesuffix(self.tokenizer.decode(self.eos))


def with_start(chunk):
    """The bytes of a document's tokens, of which the first one is marked as such."""
    return as_bytes(np.frombuffer(chunk[:4], "<u4") | files.START) + chunk[4:]


def as_bytes(tokens):
    return np.array(tokens, dtype="<u4").tobytes()
