"""Texts as token files for training: TinyStories (download, unpack, tokenize), or your own.

    python tiny_stories.py --tokenizer_path Meta-Llama-3.1-8B/tokenizer.model

writes tinystories/TinyStories_val.bin and TinyStories_train.bin, and prints (with Llama 3's vocabulary)

    Number of shards: 50
    Tokenizing val split...
    writing 18,660,516 tokens to tinystories/TinyStories_val.bin
    Tokenizing train split...
    writing 907,021,844 tokens to tinystories/TinyStories_train.bin

The stories are those of "TinyStories: How Small Can Language Models Be and Still Speak Coherent English?"
(Eldan & Li, 2023). They need room on the disk for an archive of 1.5 GB, for the JSON unpacked from it, and
for 3.7 GB of tokens, which lie there twice while shards are joined.

    python tiny_stories.py text --input notes chats.jsonl.gz --data_dir mine --vocab_size 4096

writes mine/val.bin and mine/train.bin, with a vocabulary trained on these texts.

plumbing/files.py describes .bin files; manifest.json says what they were made from. A file appears under its
final name only when it is complete. After an interruption the same command goes on with what is unfinished.
"""

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil

import numpy as np
from tqdm import tqdm

from plumbing import cli, files
from plumbing.documents import SHARDS, find_inputs, find_shards, read_documents, read_shard
from plumbing.download import check_archive, fetch, unpack
from plumbing.machine import usable_cores
from plumbing.meta_vocabulary import SPELLED
from plumbing.records import FIELD, is_learned, texts_of
from plumbing.summary import print_seen, print_splits
from plumbing.tokenizer_json import digest_of
from plumbing.words import Words, with_start
from plumbing.workers import run_in_order
from tokenizer import Tokenizer, train_tokenizer

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
ARCHIVE = "TinyStories_all_data.tar.gz"
DATA_DIR = "tinystories"
TOKENIZER_PATH = "Meta-Llama-3.1-8B/tokenizer.model"
LLAMA3 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"  # SHA-256 of Meta's file
KNOWN_TOKENS = {"val": 18_660_516, "train": 907_021_844}  # What Meta's vocabulary makes of all 50 shards.
SHARD_CHARS = 2**25  # Your own text is cut into shards of so many characters, each a job for one worker.
SAMPLE_CHARS = 2**25  # A vocabulary is trained on so many characters of your text.

# -----------------------------------------------------------------------------
# Download


def download(data_dir: str = DATA_DIR, url: str = URL, sha256: str | None = None):
    """Downloads the archive into data_dir and unpacks it to data_dir/TinyStories_all_data/data*.json.

    Complete files are kept, and an interrupted download continues. ConnectionError: the server doesn't give
    the archive. ValueError: the archive is damaged or another one.

    Args:
        data_dir: folder that takes the archive and the shards
        url: address of the archive, a .tar.gz of data*.json
        sha256: digest that the archive must have; None: that of an earlier download, if there was one
    """
    folder = os.path.join(data_dir, SHARDS)
    archive = os.path.join(data_dir, ARCHIVE)
    unpacked = bool(find_shards(folder))
    os.makedirs(data_dir, exist_ok=True)
    if os.path.exists(archive):
        print(f"{archive} already exists, skipping download...")
        digest = check_archive(archive, archive, sha256)
    elif not unpacked:
        print(f"Downloading {url} to {archive}...")
        digest = fetch(url, archive, sha256)
    if unpacked:
        print(f"{folder} already exists, skipping unpacking...")
    else:
        print(f"Unpacking {archive}...")
        unpack(archive, folder, digest)
    print(f"Number of shards: {len(find_shards(folder))}")


def read_stories(path):
    """The texts of a shard, a JSON list of {"story": text}, in file order; ValueError names the file."""
    return [record["story"] for record in read_shard(path)]

# -----------------------------------------------------------------------------
# Tokenize


def tokenize(data_dir: str = DATA_DIR, tokenizer_path: str = TOKENIZER_PATH, num_workers: int | None = None):
    """Writes data_dir/TinyStories_val.bin, the first shard, and TinyStories_train.bin, the others in order.

    A train split of more than 2^31 - 1 tokens becomes TinyStories_train_000.bin, _001.bin, … Files of an
    earlier run stay until both splits are complete. FileNotFoundError: there are no shards. ValueError: one
    is damaged. OSError: the disk has too little room.

    Args:
        data_dir: folder of the downloaded shards, which takes the .bin files
        tokenizer_path: tokenizer.model or .json that gives the vocabulary
        num_workers: processes, which don't change the result; None: one per core
    """
    folder = os.path.join(data_dir, SHARDS)
    shards = find_shards(folder)
    if len(shards) < 2:
        raise FileNotFoundError(f"{folder} holds {len(shards)} data*.json, expected at least 2: one for "
                                f"validation, the rest for training; run tiny_stories.py download first")
    splits = {"val": shards[:1], "train": shards[1:]}
    counts = write_splits(data_dir, "TinyStories_", splits, tokenizer_path, num_workers)
    if len(shards) == 50 and files.sha256_of(tokenizer_path) == LLAMA3:
        matching = "match" if counts == KNOWN_TOKENS else f"do not match {KNOWN_TOKENS}, the known ones"
        print(f"The counts of the full dataset {matching}.")


def write_splits(data_dir, prefix, splits, tokenizer_path, num_workers, max_tokens=files.MAX_TOKENS,
                 special=False):
    """Tokenizes splits, name -> shards, to data_dir/PREFIXname.bin; returns name -> number of tokens.

    special: as in Words.
    """
    tokenizer = Tokenizer(tokenizer_path)  # An unusable vocabulary is an error here, before the work.
    assert tokenizer.n_words <= files.START  # The bits above are for marks.
    num_workers = usable_cores() if num_workers is None else num_workers
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}, expected at least 1")
    finished = os.path.join(data_dir, "tokens.part")  # A folder for the tokens of each finished shard.
    os.makedirs(finished, exist_ok=True)
    digest = files.sha256_of(tokenizer_path)
    recipe = digest_of(tokenizer_path)
    jobs = []
    for split in splits.values():
        jobs += [(shard, i, finished, tokenizer_path, recipe, special) for i, shard in enumerate(split)]
    # The tokens lie on the disk twice, by shard and joined, which takes about as much room as the JSON does.
    json_bytes = sum(os.path.getsize(shard) for shard, *_ in jobs)
    done_bytes = sum(entry.stat().st_size for entry in os.scandir(finished))
    files.check_disk("tokenizing", json_bytes - done_bytes, data_dir)
    made = {}
    counts = {}
    with contextlib.closing(run_in_order(finish_shard, jobs, min(num_workers, len(jobs)))) as results:
        for name, split in splits.items():
            print(f"Tokenizing {name} split...")
            done = list(tqdm(itertools.islice(results, len(split)), total=len(split), unit="shard"))
            stem = os.path.join(data_dir, prefix + name)
            made |= write_split(stem, done, digest, max_tokens, tokenizer.mark_id)
            if num_lost := sum(header.num_lost for _, header, _ in done):
                print(f"Not learned: answers that the chat template drops or tears apart: {num_lost:,}")
            counts[name] = sum(about["tokens"] for *_, about in done)
    files.write_manifest(data_dir, files={})  # While files are replaced, the manifest describes none.
    for path in made:
        os.replace(f"{path}.new", path)
    for name in os.listdir(data_dir):  # An earlier train split may be in another number of files.
        path = os.path.join(data_dir, name)
        if re.fullmatch(prefix + r"train(_\d\d\d)?\.bin", name) and path not in made:
            os.remove(path)
    files.write_manifest(data_dir, files={os.path.basename(path): about for path, about in made.items()})
    shutil.rmtree(finished)
    return counts


def write_split(stem, finished, tokenizer_digest, max_tokens, mark_id):
    """Joins finished shards, each kept whole, in as few files as hold them, each written as PATH.new.

    Returns path -> what the manifest says about that file.
    """
    groups = [[]]
    filled = 0
    for shard in finished:
        num_tokens = shard[2]["tokens"]
        if filled and filled + num_tokens > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += num_tokens
    made = {}
    for number, group in enumerate(groups):
        path = f"{stem}_{number:03d}.bin" if len(groups) > 1 else f"{stem}.bin"
        parts, headers, shards = zip(*group, strict=True)
        versions = [header.version for header in headers]
        about = {key: sum(shard[key] for shard in shards) for key in ("stories", "tokens", "bytes")}
        print(f"writing {about['tokens']:,} tokens to {path}")
        files.write_tokens(f"{path}.new", read_parts(parts, versions, mark_id), max(versions))
        made[path] = about | {"version": max(versions), "tokenizer": tokenizer_digest, "shards": shards}
    return made


def read_parts(parts, versions, mark_id):
    """Yields the tokens of each part, stored as the highest of their versions stores them."""
    for path, version in zip(parts, versions, strict=True):
        tokens = files.read_tokens(path)
        if version < max(versions):  # In a part without marks this id alone begins a document.
            tokens[tokens == mark_id] |= files.START
        yield tokens


def finish_shard(shard, index, folder, tokenizer_path, recipe, special):
    """Writes a shard's tokens to a .bin in folder, or finds it there; returns path, Header and counts.

    recipe: the digest of all that says how the tokenizer encodes.
    """
    name = os.path.basename(shard)
    digest = files.sha256_of(shard)
    # The name depends on all that the content depends on, so that no file is taken for another one.
    key = hashlib.sha256(f"{name} {digest} {index} {recipe} {special}".encode()).hexdigest()
    path = os.path.join(folder, f"{key[:32]}.bin")
    if not os.path.exists(path):
        try:
            chunks, *about = encode_shard(index, shard, words_of(tokenizer_path, recipe, special))
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"{shard}: tokenizing failed with {error!r}") from error
        files.write_tokens(path, (np.frombuffer(chunk, "<u4") for chunk in chunks), *about)
    header = files.read_header(path)
    return path, header, {"name": name, "sha256": digest, "stories": header.num_documents,
                          "tokens": header.num_tokens, "bytes": header.num_bytes}


def process_shard(shard_index, shard_filename, tokenizer_path):
    """The tokens of a shard as uint32: its stories, shuffled, each as <BOS> tokens <EOS>.

    ValueError names a damaged shard.
    """
    chunks, *_ = encode_shard(shard_index, shard_filename, Words(Tokenizer(tokenizer_path)))
    return np.frombuffer(bytearray().join(chunks), dtype="<u4")


def encode_shard(shard_index, shard, words):
    """Returns (bytes of each record's tokens, shuffled; version of the .bin; records; bytes of text; lost).

    lost: how many answers of dialogs have no targets, though they should.
    """
    chunks = []
    lost_before = words.num_lost
    has_marks = words.tokenizer.mark_id is None
    num_bytes = 0
    for record in read_shard(shard):
        chunks.append(words.encode(record))
        has_marks = has_marks or "story" not in record or words.reads_special(record["story"])
        num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts_of(record))
    random.Random(1337 + shard_index).shuffle(chunks)  # shard_index counts within a split, from 0.
    version = files.VERSION
    if has_marks:
        chunks = list(map(with_start, chunks))
        version = files.MARKING_VERSION
    return chunks, version, len(chunks), num_bytes, words.num_lost - lost_before


@functools.lru_cache(maxsize=1)
def words_of(tokenizer_path, digest, special):
    """The Words that a process keeps from shard to shard; a file that has changed has another digest."""
    return Words(Tokenizer(tokenizer_path), special)

# -----------------------------------------------------------------------------
# Your own text


def text(*, input: list[str], data_dir: str = "text", tokenizer_path: str | None = None,
         vocab_size: int | None = None, field: str = FIELD, separator: str | None = None,
         special: bool = False, val_fraction: float = 0.01, num_workers: int | None = None):
    """Tokenizes your own texts and chats to data_dir/val.bin and data_dir/train.bin.

    A .txt or .md holds a document, or several between separators. A .json, .jsonl or .ndjson holds objects,
    as an array or one after another, a .parquet (which needs pyarrow) rows. Of a row the first of these is
    read: another field than "text", if you name one; the chat "messages": [{"role": …, "content": …}], or
    ShareGPT's "conversations"; "prompt" and "completion"; Alpaca's "instruction", "input" and "output"; the
    field. A chat is written by the chat template that lies beside a tokenizer.json, or in Llama 3's format.
    Of chats only the assistant's turns are learned, unless their "weight" is 0, of prompts only the
    completion. ValueError names the file, the document and the message that can't be read.

    Args:
        input: files, folders or patterns, one or several; files also gzipped (.gz)
        data_dir: folder that takes val.bin, train.bin and the trained vocabulary
        tokenizer_path: tokenizer.model or .json, the vocabulary; None: Meta's, where tokenize expects it
        vocab_size: train a vocabulary of so many tokens on the texts, data_dir/tokenizer.model; None: don't
        field: name of the text in objects and rows; another than text comes before chats and prompts
        separator: text between a .txt's documents, with \\n for a line break; None: each file is one
        special: read <|eot_id|> and the like in texts and prompts as special tokens, in chats never
        val_fraction: share of documents for validation, chosen by their hash, one at least
        num_workers: processes, which don't change the result; None: one per core
    """
    if vocab_size is not None and tokenizer_path is not None:
        raise ValueError("found --vocab_size and --tokenizer_path, expected one of them")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
    paths, left_out = find_inputs(input)
    if vocab_size is None:
        tokenizer_path = tokenizer_path or TOKENIZER_PATH
        spelled = Tokenizer(tokenizer_path).spelled  # An unusable one is an error here, before the work.
    else:
        spelled = SPELLED  # A vocabulary that is trained here has these.
    cli.expect(separator != "", "separator", "empty", "a text, such as \\n\\n")
    folder = os.path.join(data_dir, "documents.part")  # It is quick to write, so every run writes it again.
    others = f", not {left_out:,} others beside them" if left_out else ""
    print(f"Reading {len(paths):,} files{others}...")
    try:
        least, seen = split_documents(paths, field, separator, val_fraction, folder, spelled)
        if least >= val_fraction:  # Validation got no document. Now it gets the one with the least hash.
            _, seen = split_documents(paths, field, separator, math.nextafter(least, 2), folder, spelled)
        print_seen(seen, special)
        splits = {name: find_shards(os.path.join(folder, name)) for name in ("val", "train")}
        if not splits["train"]:
            raise ValueError(f"{paths[0]}: found no two documents to train and to validate on, expected "
                             "more; --separator cuts .txt files, --val_fraction is the share of validation")
        if vocab_size is not None:
            tokenizer_path = os.path.join(data_dir, "tokenizer.model")
            train_tokenizer(sample_texts(splits["train"], special), vocab_size, tokenizer_path)
        write_splits(data_dir, "", splits, tokenizer_path, num_workers, special=special)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_splits(data_dir, val_fraction)


def split_documents(paths, field, separator, val_fraction, folder, spelled):
    """Writes each document to a shard in folder/val if its hash is below val_fraction, else in folder/train.

    A hash is a number from 0 to 1. spelled: finds the name of a special token. Returns the least hash, and a
    Counter of what print_seen tells.
    """
    shutil.rmtree(folder, ignore_errors=True)
    lines = {"val": [], "train": []}  # split -> documents of the shard that is being filled, as JSON
    sizes = collections.Counter()  # split -> characters in these lines
    numbers = collections.Counter()  # split -> shards that are written
    seen = collections.Counter()
    least = 1.0

    def flush(split):
        path = os.path.join(folder, split, f"data{numbers[split]:05d}.json")
        with files.complete(path) as file:
            file.write(f"[{', '.join(lines[split])}]".encode())
        lines[split].clear()
        sizes[split] = 0
        numbers[split] += 1

    for split in lines:
        os.makedirs(os.path.join(folder, split))
    for record in itertools.chain.from_iterable(read_documents(path, field, separator) for path in paths):
        seen["tools"] += record.pop("tools", False)
        if "messages" in record and not any(map(is_learned, record["messages"])):
            seen["unlearned"] += 1
            continue
        texts = texts_of(record)
        if not any(map(str.strip, texts)):
            seen["empty"] += 1
            continue
        if names := sum(len(spelled.findall(text)) for text in texts):
            seen["spelled"] += names
            seen["spelling"] += 1
        line = json.dumps(record)
        place = int.from_bytes(hashlib.sha256(line.encode()).digest()[:6]) / 2**48
        least = min(least, place)
        split = "val" if place < val_fraction else "train"
        lines[split].append(line)
        sizes[split] += len(line)
        if sizes[split] > SHARD_CHARS:
            flush(split)
    for split in lines:
        if lines[split]:
            flush(split)
    return least, seen


def sample_texts(shards, special):
    """Yields texts from the beginning of every shard, about SAMPLE_CHARS in all.

    special: whether special tokens that they spell are left out, because they are no text to be learned.
    """
    for shard in shards:
        left = SAMPLE_CHARS / len(shards)
        for text in itertools.chain.from_iterable(map(texts_of, read_shard(shard))):
            yield SPELLED.sub("\n", text) if special else text
            left -= len(text)
            if left < 0:
                break

# -----------------------------------------------------------------------------
# Command line


def prepare(data_dir: str = DATA_DIR, url: str = URL, tokenizer_path: str = TOKENIZER_PATH,
            num_workers: int | None = None, sha256: str | None = None):
    """Downloads, unpacks and tokenizes TinyStories.

    Args:
        data_dir: folder that takes the archive, the shards and the .bin files
        url: address of the archive, a .tar.gz of data*.json
        tokenizer_path: tokenizer.model or .json that gives the vocabulary
        num_workers: processes, which don't change the result; None: one per core
        sha256: digest that the archive must have; None: that of an earlier download, if there was one
    """
    Tokenizer(tokenizer_path)  # An unusable vocabulary is an error here, before 1.5 GB of download.
    download(data_dir, url, sha256)
    tokenize(data_dir, tokenizer_path, num_workers)


if __name__ == "__main__":
    cli.run({"download": download, "tokenize": tokenize, "text": text, "prepare": prepare}, "prepare")
