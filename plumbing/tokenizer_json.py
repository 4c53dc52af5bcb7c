"""tokenizer.json, as Hugging Face's folders have it: a byte-level BPE, its special tokens, their roles.

The tokenizers library computes it. Special tokens are taken out before, so that the library knows nothing
but text; their names are found here, where they are allowed.
"""

import functools
import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from plumbing.chat_template import FILE, ChatTemplate, names_pattern, read_template, well_formed
from plumbing.files import START, complete, sha256_of
from plumbing.meta_vocabulary import SPLIT_PATTERN, STOPPING
from plumbing.text_files import read_json

# The files beside a tokenizer.json, that which counts most first -> how each calls the token, or the tokens,
# of a role, bos or eos.
ROLES_OF = {
    "generation_config.json": "{}_token_id",
    "config.json": "{}_token_id",
    "tokenizer_config.json": "{}_token",
}

BESIDE = "tokenizer_config.json", FILE  # The first may hold a chat template, the second is one.


class HuggingFaceVocabulary:
    """A tokenizer.json of byte-level BPE, with the configs beside it.

    Every added token is special, also one that the file doesn't call so, such as DeepSeek's <|Assistant|>,
    with which contents could forge turns. White space can't, so runs of it stay text. FileNotFoundError:
    there is no such file. ValueError: a file is damaged, or it is no byte-level BPE.
    """

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as BPE  # Meta's folders do without the package.
        self.path = path
        data = read_json(Path(path))
        try:
            self.special_tokens, self.token_bytes = take_special_tokens(data)
            self.bpe = BPE.from_str(json.dumps(data))
        except Exception as error:  # The library raises no narrower one.
            found = error if type(error) is ValueError else f"damage ({error!r:.80})"
            raise ValueError(f"{path}: found {found}, expected a byte-level BPE; download it again, or give "
                             "another --tokenizer_path") from None
        is_llamas = data["pre_tokenizer"] == json.loads(word_splitter().__getstate__())
        self.cuts_at_spaces = is_llamas and not data.get("normalizer") and not data["added_tokens"]
        self.patterns: dict[frozenset[str], re.Pattern] = {}  # names -> what finds them in a text
        paths = [Path(path).with_name(name) for name in ROLES_OF]
        self.configs = {path.name: read_json(path) for path in paths if path.exists()}
        self.stop_tokens = self.find_stop_tokens()
        self.bos_id = self.find_bos()
        self.bpe.post_processor = None  # What puts BOS before a text also moves where tokens begin.

    @functools.cached_property
    def template(self) -> ChatTemplate | None:
        """What makes a dialog's text, where the folder has one. Errors: see ChatTemplate, read_template."""
        config = self.configs.get("tokenizer_config.json", {})
        found = read_template(Path(self.path).parent, config)
        return found and ChatTemplate(*found, config)

    def named(self, file: str, role: str) -> list[int]:
        """The ids that a config names for a role, bos or eos: a number, a name, an object, or several."""
        key = ROLES_OF[file].format(role)
        values = self.configs.get(file, {}).get(key)
        source = Path(self.path).with_name(file)
        ids = []
        for value in values if isinstance(values, list) else [values]:
            name = value.get("content") if isinstance(value, dict) else value
            i = self.special_tokens.get(name, name) if isinstance(name, str) else name
            if type(i) is int and 0 <= i < len(self.token_bytes):
                ids.append(i)
            elif value is not None:
                raise ValueError(f"{source}: {key} is {value!r:.60}, expected ids or special tokens of "
                                 f"{self.path}; mend it, or download both again")
        return ids

    def find_stop_tokens(self) -> list[int]:
        """The ids that end a text, the first of which is eos_id.

        First those at which transformers' generate ends, in generation_config.json, or in config.json where
        that names none: it is older and often holds mere defaults. Then the tokenizer's own, because many a
        finetune changed nothing else to end its turns. Llama 3's, where no file names any.
        """
        found = self.named("generation_config.json", "eos") or self.named("config.json", "eos")
        found += self.named("tokenizer_config.json", "eos")
        found = found or [self.special_tokens[name] for name in STOPPING if name in self.special_tokens]
        return list(dict.fromkeys(found))

    def find_bos(self) -> int | None:
        """The id that begins a text, or None.

        It is what tokenizer.json itself puts there, as in transformers. Where that is nothing, it is the BOS
        of the first config that names one, but only if add_bos_token of tokenizer_config.json is true, as in
        folders of transformers 4. So SmolLM2 has none, though its configs name <|im_start|>: that begins
        turns, and a text behind it would be read as one.
        """
        first = self.bpe.encode("a").ids[0]
        if first != self.encode("a")[0]:
            return first
        adds_bos = self.configs.get("tokenizer_config.json", {}).get("add_bos_token")
        found = [i for file in ROLES_OF for i in self.named(file, "bos")]
        return found[0] if adds_bos and found else None

    def check(self, vocab_size: int) -> None:
        """See Tokenizer.check_vocabulary; a model's rows may be more, for they are padded to a multiple."""
        for i in range(vocab_size, len(self.token_bytes)):
            if self.token_bytes[i]:
                name = self.token_bytes[i].decode(errors="replace")
                raise ValueError(f"{self.path}: token {name!r} has id {i}, expected ids below {vocab_size}, "
                                 "the model's rows; give the tokenizer that the model was trained with")

    def encode(self, s: str, names: Collection[str] = ()) -> list[int]:
        """Token ids of a text in which those special tokens are read."""
        s = well_formed(s)
        names = frozenset(names)
        if names not in self.patterns:
            self.patterns[names] = names_pattern(names)
        tokens = []
        begin = 0
        for found in self.patterns[names].finditer(s):
            tokens += self.encode_plain(s[begin:found.start()])[0]
            tokens.append(self.special_tokens[found[0]])
            begin = found.end()
        return tokens + self.encode_plain(s[begin:])[0]

    def encode_plain(self, s: str) -> tuple[list[int], list[int]]:
        """Token ids of a text without special tokens, and how many whole characters precede each."""
        encoding = self.bpe.encode(s, add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]


def take_special_tokens(data: dict) -> tuple[dict[str, int], list[bytes]]:
    """Takes special tokens out of what a tokenizer.json says, so that their names are read as any text.

    Returns name -> id, and the bytes of each id, none for one without a token. ValueError: this is no
    byte-level BPE; or any exception, where it is damaged.
    """
    model = data["model"]
    splitter = data["pre_tokenizer"] or {}
    kinds = [part["type"] for part in splitter.get("pretokenizers", [splitter]) if part]
    if model.get("type", "BPE") != "BPE" or "ByteLevel" not in kinds:
        raise ValueError(f"a {model.get('type', 'BPE')} model behind {' and '.join(kinds) or 'no splitter'}")
    added = data.get("added_tokens") or []
    special_tokens = {token["content"]: token["id"] for token in added if token["content"].strip()}
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"token {token['content']!r}, which depends on what stands around it")
    data["added_tokens"] = [token for token in added if not token["content"].strip()]
    texts = model["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    for name in special_tokens:
        texts.pop(name, None)
    model["vocab"] = texts  # Added tokens that are not in it would get new ids.
    model["unk_token"] = None  # A byte without a token must not become a special one.
    data["truncation"] = data["padding"] = None  # A file may be saved with those of a batch.

    ids = [*texts.values(), *special_tokens.values()]
    if len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < START for i in ids):
        raise ValueError("ids that are not whole numbers, each of one token")
    token_bytes = [b""] * (max(ids, default=-1) + 1)
    for token, i in texts.items():
        is_written = all(character in BYTE_OF for character in token)
        token_bytes[i] = bytes(BYTE_OF[character] for character in token) if is_written else token.encode()
    known = set(token_bytes)
    # Some vocabularies, as SmolLM2's, are without control characters, which then are left out of texts.
    absent = [chr(byte) for byte in range(33, 127) if bytes([byte]) not in known]
    if absent:
        raise ValueError(f"no token for {''.join(absent):.20}")
    for name, i in special_tokens.items():
        token_bytes[i] = name.encode()
    return special_tokens, token_bytes


def name_of_copy(path):
    """How the file of a tokenizer is named in our folders."""
    return "tokenizer.json" if str(path).endswith(".json") else "tokenizer.model"


def digest_of(path):
    """A SHA-256 of all that says how a tokenizer encodes: of its file, and of what belongs to a .json."""
    digests = [sha256_of(path)]
    for name in BESIDE if str(path).endswith(".json") else ():
        if Path(path).with_name(name).exists():
            digests.append(name + sha256_of(Path(path).with_name(name)))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def copy_tokenizer(path, folder):
    """Copies the file of a tokenizer to a folder, and with a tokenizer.json what belongs to it.

    Of config.json only the ids are taken, into generation_config.json: its shape is another model's.
    """
    path = Path(path)
    copies = {name_of_copy(path): path.read_bytes()}
    if path.suffix == ".json":
        for name in *BESIDE, "special_tokens_map.json":  # transformers 4 reads the last one.
            if path.with_name(name).exists():
                copies[name] = path.with_name(name).read_bytes()
        ids = {}
        for name in "config.json", "generation_config.json":  # The second counts where it has one.
            config = read_json(path.with_name(name)) if path.with_name(name).exists() else {}
            for key in "bos_token_id", "eos_token_id":
                if config.get(key) is not None:
                    ids[key] = config[key]
        copies["generation_config.json"] = json.dumps(ids).encode()
    for name, content in copies.items():
        with complete(Path(folder, name)) as file:
            file.write(content)


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
