"""Texts as token files for training: TinyStories (download, unpack, tokenize), or your own.

    python tiny_stories.py --tokenizer_path Meta-Llama-3.1-8B/tokenizer.model

writes tinystories/TinyStories_val.bin and TinyStories_train.bin, and prints (with Llama 3's vocabulary)

    Number of shards: 50
    Tokenizing val split...
    writing 18,660,516 tokens to tinystories/TinyStories_val.bin
    Tokenizing train split...
    writing 907,021,844 tokens to tinystories/TinyStories_train.bin

The stories are those of "TinyStories: How Small Can Language Models Be and Still Speak Coherent English?"
(Eldan & Li, 2023). On disk: 1.5 GB of archive, the JSON in it, 72 MB and 3.4 GB of tokens, twice meanwhile.

    python tiny_stories.py text --input notes/*.txt chats.jsonl.gz --data_dir mine --vocab_size 4096

writes mine/val.bin and mine/train.bin, with a vocabulary trained on these texts.

A .bin file is 256 little-endian int32 of header (magic, version, number of tokens, zeros), then the tokens
as little-endian uint32. In version 8, of chats, bit 31 marks a token that is read but is no target.
manifest.json tells what the files were made from. Every file appears under its final name only when it is
complete, and after any interruption the same command goes on with what is unfinished.
"""

import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
from multiprocessing import resource_tracker

import numpy as np
from tqdm import tqdm

from plumbing import cli
from plumbing.documents import SHARDS, find_shards, read_documents, read_shard, texts_of
from plumbing.download import check_archive, fetch, unpack
from plumbing.files import (
    MASKED,
    MASKING_VERSION,
    MAX_TOKENS,
    VERSION,
    check_disk,
    complete,
    read_header,
    read_tokens,
    sha256_of,
    write_manifest,
    write_tokens,
)
from tokenizer import MAX_CHARS, Tokenizer, train_tokenizer

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
ARCHIVE = "TinyStories_all_data.tar.gz"
DATA_DIR = "tinystories"
TOKENIZER_PATH = "Meta-Llama-3.1-8B/tokenizer.model"

SHARD_CHARS = SAMPLE_CHARS = 2**25  # of your own text: a worker's job, and what a vocabulary is trained on

LLAMA3 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"  # SHA-256 of its tokenizer.model
KNOWN_TOKENS = {"val": 18_660_516, "train": 907_021_844}  # with it, of all 50 shards


# -----------------------------------------------------------------------------
# download


def download(data_dir: str = DATA_DIR, url: str = URL, sha256: str | None = None):
    """Downloads the archive into data_dir and unpacks it to data_dir/TinyStories_all_data/data*.json.

    What is complete already is kept; an interrupted download or unpacking continues. sha256: the archive's
    digest, if you know it; else that of the first download has to come again, from the manifest.
    ConnectionError: the server can't be reached, refuses, or breaks off. ValueError: the archive is broken,
    unsafe, or another one.
    """
    folder, archive = os.path.join(data_dir, SHARDS), os.path.join(data_dir, ARCHIVE)
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


# -----------------------------------------------------------------------------
# shards


def read_stories(path):
    """The texts of a shard, a JSON list of {"story": text}, in file order; ValueError names the file."""
    return [record["story"] for record in read_shard(path)]


# -----------------------------------------------------------------------------
# tokenize


def tokenize(data_dir: str = DATA_DIR, tokenizer_path: str = TOKENIZER_PATH, num_workers: int | None = None):
    """Writes data_dir/TinyStories_val.bin, the first shard, and TinyStories_train.bin, the others in order.

    num_workers: processes, None for one per core; the files are the same for any number. A train split of
    more than 2^31 - 1 tokens becomes TinyStories_train_000.bin, _001.bin, … Files of an earlier run stay
    until both splits are complete. FileNotFoundError without shards or tokenizer, ValueError if broken,
    OSError without room on the disk.
    """
    folder = os.path.join(data_dir, SHARDS)
    shards = find_shards(folder)
    if len(shards) < 2:
        raise FileNotFoundError(f"{folder} holds {len(shards)} data*.json, expected at least 2: one for "
                                f"validation, the rest for training; run tiny_stories.py download first")
    splits = {"val": shards[:1], "train": shards[1:]}
    counts = write_splits(data_dir, "TinyStories_", splits, tokenizer_path, num_workers)
    if len(shards) == 50 and sha256_of(tokenizer_path) == LLAMA3:
        matching = "match" if counts == KNOWN_TOKENS else f"do not match {KNOWN_TOKENS}, the known ones"
        print(f"The counts of the full dataset {matching}.")


def write_splits(data_dir, prefix, splits, tokenizer_path, num_workers):
    """Tokenizes splits, name -> shards, to data_dir/PREFIXname.bin; returns name -> number of tokens."""
    Tokenizer(tokenizer_path)  # its errors come once, before the work
    num_workers = os.cpu_count() if num_workers is None else num_workers
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}, expected at least 1")
    finished = os.path.join(data_dir, "tokens.part")  # a folder of finished shards
    os.makedirs(finished, exist_ok=True)
    shards = [shard for split in splits.values() for shard in split]
    done_bytes = sum(entry.stat().st_size for entry in os.scandir(finished))
    check_disk("tokenizing", sum(map(os.path.getsize, shards)) - done_bytes, data_dir)  # twice the tokens
    digest = sha256_of(tokenizer_path)
    jobs = [(i, shard, finished, tokenizer_path, digest)
            for split in splits.values() for i, shard in enumerate(split)]
    files, counts = {}, {}
    with contextlib.closing(process_shards(jobs, min(num_workers, len(jobs)))) as results:
        for name, split in splits.items():
            print(f"Tokenizing {name} split...")
            done = list(tqdm(itertools.islice(results, len(split)), total=len(split), unit="shard"))
            files |= write_split(os.path.join(data_dir, prefix + name), done, digest)
            counts[name] = sum(about["tokens"] for *_, about in done)
    write_manifest(data_dir, files={})  # so that it never tells of other files than are there
    for path in files:
        os.replace(f"{path}.new", path)
    for suffix in "", "_[0-9][0-9][0-9]":  # an earlier train split may be in another number of files
        for path in glob.glob(os.path.join(glob.escape(data_dir), f"{prefix}train{suffix}.bin")):
            if path not in files:
                os.remove(path)
    write_manifest(data_dir, files={os.path.basename(path): about for path, about in files.items()})
    shutil.rmtree(finished)
    return counts


def process_shards(jobs, num_workers):
    """Yields finish_shard(*job) for each job, in order."""
    if num_workers == 1:
        yield from itertools.starmap(finish_shard, jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a caller may have threads (torch), which fork would break
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, spawn, initializer=end_with_parent)
    resource_tracker.ensure_running()  # its start would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # workers inherit it: Ctrl-C is for
    try:                                                                # this process, which then kills them
        results = []
        for job in jobs:
            shard = job[1]
            try:
                results.append(pool.submit(finish_shard, *job))
            except OSError:  # the pool is closing its pipes, as a worker has died
                raise concurrent.futures.BrokenExecutor from None
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for job, result in zip(jobs, results, strict=True):
            shard = job[1]
            yield result.result()
    except concurrent.futures.BrokenExecutor:
        raise OSError(f"{shard}: its worker, or that of a later shard, was killed; if memory ran out, try "
                      "fewer --num_workers") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown()


def end_with_parent():
    """Lets a worker end with its parent, if that is killed: an executor's would wait for ever."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def finish_shard(index, shard, folder, tokenizer_path, tokenizer_digest):
    """Writes a shard's tokens to a .bin file in folder, or finds it there; returns (path, version, counts).

    The file's name follows from all that its content depends on.
    """
    name, digest = os.path.basename(shard), sha256_of(shard)
    key = hashlib.sha256(f"{name} {digest} {index} {tokenizer_digest}".encode()).hexdigest()
    path = os.path.join(folder, f"{key[:32]}.bin")
    if not os.path.exists(path):
        try:
            chunks, *about = encode_shard(index, shard, words_of(tokenizer_path, tokenizer_digest))
        except (ValueError, OSError):
            raise
        except Exception as error:
            raise ValueError(f"{shard}: tokenizing failed with {error!r}") from error
        write_tokens(path, (np.frombuffer(chunk, "<u4") for chunk in chunks), *about)
    header = read_header(path)
    return path, header.version, {"name": name, "sha256": digest, "stories": header.num_documents,
                                  "tokens": header.num_tokens, "bytes": header.num_bytes}


def process_shard(shard_index, shard_filename, tokenizer_path):
    """The tokens of one shard, uint32: its stories, shuffled and stripped, each as <BOS> tokens <EOS>.

    The shuffle's seed is 1337 + shard_index, the shard's place within its split. ValueError names the shard.
    """
    chunks, *_ = encode_shard(shard_index, shard_filename, Words(Tokenizer(tokenizer_path)))
    return np.frombuffer(bytearray().join(chunks), dtype="<u4")


def encode_shard(shard_index, shard, words):
    """(shuffled records as the bytes of their tokens, version of the format, records, bytes of text)."""
    chunks, version, num_bytes = [], VERSION, 0
    for record in read_shard(shard):
        chunks.append(words.encode(record))
        version = MASKING_VERSION if "messages" in record else version
        num_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts_of(record))
    random.Random(1337 + shard_index).shuffle(chunks)
    return chunks, version, len(chunks), num_bytes


BETWEEN_WORDS = re.compile(r" (?=\S)(?<=\S )")


class Words(dict):
    """Encodes records to bytes of uint32, fast as it remembers words: "word" -> tokens of " word".

    A text can be encoded in pieces, cut at spaces that no other white space touches: Llama 3's pattern joins
    those to what follows, never to what precedes.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, key):
        word = "".join(key)  # the key of a text's first word, before which no space is, is a tuple
        if not word or word[0].isspace() or word[-1].isspace():  # it was not to be cut there
            raise KeyError(word)
        tokens = as_bytes(self.tokenizer.encode(word if isinstance(key, tuple) else f" {word}"))
        if len(self) < 2**17 and len(word) < 32:  # 30 MB at most
            self[key] = tokens
        return tokens

    def encode(self, record):
        """<BOS> story <EOS>, or a dialog, masked but for the assistant's words and <|eot_id|>."""
        tokenizer = self.tokenizer
        if "messages" in record:
            tokens = [tokenizer.bos_id | MASKED]
            for message in record["messages"]:
                ids, by_assistant = tokenizer.encode_message(message), message["role"] == "assistant"
                said = len(tokenizer.encode_header("assistant")) if by_assistant else len(ids)
                tokens += [i | MASKED for i in ids[:said]] + ids[said:]
            return as_bytes(tokens)
        [text] = texts_of(record)
        if not text or len(text) > MAX_CHARS:  # which Meta cuts, be it in a word
            tokens = [as_bytes(tokenizer.encode(text))]
        else:
            try:
                tokens = self.look_up(text.split(" "))
            except KeyError:  # slower, for texts with line breaks or double spaces
                tokens = self.look_up(BETWEEN_WORDS.split(text))
        return b"".join([as_bytes([tokenizer.bos_id]), *tokens, as_bytes([tokenizer.eos_id])])

    def look_up(self, words):
        return [self[words[0],], *map(self.__getitem__, words[1:])]


@functools.lru_cache(maxsize=1)
def words_of(tokenizer_path, digest):  # of the file, which may change
    return Words(Tokenizer(tokenizer_path))


def as_bytes(tokens):
    return np.array(tokens, dtype="<u4").tobytes()


# -----------------------------------------------------------------------------
# token files


def write_split(stem, finished, tokenizer_digest):
    """Joins finished shards, each kept whole, to as few .bin files as hold them; returns path -> about it.

    One file will be STEM.bin, several STEM_000.bin, STEM_001.bin, …: for now with .new appended.
    """
    groups, filled = [[]], 0
    for shard in finished:
        if filled and filled + shard[2]["tokens"] > MAX_TOKENS:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += shard[2]["tokens"]
    files = {}
    for number, group in enumerate(groups):
        path = f"{stem}_{number:03d}.bin" if len(groups) > 1 else f"{stem}.bin"
        parts, versions, shards = zip(*group, strict=True)
        about = {key: sum(shard[key] for shard in shards) for key in ("stories", "tokens", "bytes")}
        print(f"writing {about['tokens']:,} tokens to {path}")
        arrays = (read_tokens(part) for part in parts)
        write_tokens(f"{path}.new", arrays, max(versions))
        files[path] = about | {"version": max(versions), "tokenizer": tokenizer_digest, "shards": shards}
    return files


# -----------------------------------------------------------------------------
# your own text


def text(*, input: str, data_dir: str = "text", tokenizer_path: str | None = None,
         vocab_size: int | None = None, field: str = "text", separator: str | None = None,
         val_fraction: float = 0.01, num_workers: int | None = None):
    """Tokenizes your own texts and chats to data_dir/val.bin and data_dir/train.bin.

    input: files, also gzipped (.gz). .txt: a document, or several between separators (\\n is a line break).
    .jsonl, .json, .parquet (needs pyarrow): objects by line, in a list, by row; of each, the text under
    field, or a chat, "messages": [{"role": …, "content": …}], of which the assistant's turns are learned.
    tokenizer_path: None for Meta's, where tokenize expects it. vocab_size: a vocabulary of that size is
    trained on the texts instead, data_dir/tokenizer.model. val_fraction: of the documents, chosen by their
    hash, one at least. ValueError names the file and the document that can't be read.
    """
    paths = input.split("\n") if isinstance(input, str) else list(map(os.fspath, input))
    if vocab_size is not None and tokenizer_path is not None:
        raise ValueError("found --vocab_size and --tokenizer_path, expected one of them")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, expected at least 0 and less than 1")
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise FileNotFoundError(f"{missing[0]}: found no such file, expected --input PATH...")
    if vocab_size is None:
        tokenizer_path = tokenizer_path or TOKENIZER_PATH
        Tokenizer(tokenizer_path)  # its errors come before the work
    folder = os.path.join(data_dir, "documents.part")  # made anew by each run, which is quick
    print(f"Reading {len(paths):,} files...")
    least = split_documents(paths, field, separator, val_fraction, folder)
    if least >= val_fraction:  # none for validation
        split_documents(paths, field, separator, math.nextafter(least, 2), folder)
    splits = {name: find_shards(os.path.join(folder, name)) for name in ("val", "train")}
    if not splits["train"]:
        shutil.rmtree(folder)
        raise ValueError(f"{paths[0]}: found no two documents to train and to validate on, expected more; "
                         "--separator cuts .txt files, --val_fraction is the share of validation")
    if vocab_size is not None:
        tokenizer_path = os.path.join(data_dir, "tokenizer.model")
        train_tokenizer(sample_texts(splits["train"]), vocab_size, tokenizer_path)
    write_splits(data_dir, "", splits, tokenizer_path, num_workers)
    shutil.rmtree(folder)


def split_documents(paths, field, separator, val_fraction, folder):
    """Writes documents as shards to folder/val, if their hash, 0 … 1, is below val_fraction, or /train.

    Returns the least hash, 1 without documents.
    """
    shutil.rmtree(folder, ignore_errors=True)
    lines, sizes, numbers, least = {}, {}, {}, 1.0
    for split in "val", "train":
        os.makedirs(os.path.join(folder, split))
        lines[split], sizes[split], numbers[split] = [], 0, 0

    def flush(split):
        with complete(os.path.join(folder, split, f"data{numbers[split]:05d}.json")) as file:
            file.write(f"[{', '.join(lines[split])}]".encode())
        lines[split], sizes[split], numbers[split] = [], 0, numbers[split] + 1

    for record in itertools.chain.from_iterable(read_documents(path, field, separator) for path in paths):
        if not any(map(str.strip, texts_of(record))):
            continue  # nothing in it
        line = json.dumps(record)
        place = int.from_bytes(hashlib.sha256(line.encode()).digest()[:6]) / 2**48
        split, least = "val" if place < val_fraction else "train", min(least, place)
        lines[split].append(line)
        sizes[split] += len(line)
        if sizes[split] > SHARD_CHARS:
            flush(split)
    for split in filter(lines.get, lines):
        flush(split)
    return least


def sample_texts(shards):
    """Yields texts from the beginning of every shard, about SAMPLE_CHARS in all."""
    for shard in shards:
        left = SAMPLE_CHARS / len(shards)
        for text in itertools.chain.from_iterable(map(texts_of, read_shard(shard))):
            yield text
            if (left := left - len(text)) < 0:
                break


# -----------------------------------------------------------------------------
# command line


def prepare(data_dir: str = DATA_DIR, url: str = URL, tokenizer_path: str = TOKENIZER_PATH,
            num_workers: int | None = None, sha256: str | None = None):
    """Downloads, unpacks and tokenizes TinyStories."""
    Tokenizer(tokenizer_path)  # its errors come before 1.5 GB of download
    download(data_dir, url, sha256)
    tokenize(data_dir, tokenizer_path, num_workers)


def main():
    words = sys.argv[1:]
    if "--input" in words:  # the one flag that takes several words
        begin = words.index("--input") + 1
        end = next((i for i in range(begin, len(words)) if words[i].startswith("--")), len(words))
        words[begin - 1:end] = ["--input=" + "\n".join(words[begin:end])]
    commands = {"download": download, "tokenize": tokenize, "text": text, "prepare": prepare}
    cli.run(commands, default="prepare", argv=words)


if __name__ == "__main__":
    main()
