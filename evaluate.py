"""How good is a model? Bits per byte of any text, and multiple choice, both by log-likelihood.

    python evaluate.py text --ckpt_dir DIR --input PATH...
    python evaluate.py choices --ckpt_dir DIR --input FILE.jsonl
    torchrun --nproc_per_node N evaluate.py text --ckpt_dir DIR --input PATH...    # each takes its share

Bits per byte don't depend on the vocabulary, so that models of different ones can be compared.
"""

import json as json_package
import math
import os

import numpy as np
import torch
from tqdm import tqdm

from llama31 import Llama
from plumbing import answers, cli, devices, files, narrow, parallel, streams
from plumbing.cli import expect_at_least
from plumbing.documents import find_inputs, read_documents
from plumbing.questions import read_questions, shots_before
from plumbing.records import FIELD
from plumbing.scoring import batches_of, nats_of, pair_of, score_endings, windows_of
from plumbing.words import Words

TOKENS_AT_ONCE = 1024  # A CPU is no faster with more of them, but more would be padding.


def open_model(ckpt_dir, tokenizer_path, max_seq_len, device, dtype, compile, quantize, tensor_parallel):
    """(Llama, this process's share, number of shares); the first line says what was chosen."""
    rank, world_size, device = parallel.join_process_group(device)
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, device=device, dtype=dtype, compile=False,
                        quantize=quantize, tensor_parallel=tensor_parallel)
    if device.type == "cpu" and dtype is None and quantize is None and tensor_parallel == 1:
        # Products of many tokens at once, as here and in training, may want another type than decoding does.
        compute = torch.promote_types(llama.model.dtype, devices.fast_dtype(device))
        if compute != llama.model.dtype:
            narrow.widen(llama.model, compute)
    answers.make_ready(llama, compile)
    llama.required_tokenizer  # noqa: B018 (It raises where there is none.)
    return llama, rank // tensor_parallel, world_size // tensor_parallel


def show(line, record, json):
    """Prints what was found, as a line, or as a JSON object."""
    print(json_package.dumps(record) if json else line)

# -----------------------------------------------------------------------------
# Text


@streams.only_first_prints()
def text(*, ckpt_dir: str, input: list[str], tokenizer_path: str | None = None, field: str = FIELD,
         separator: str | None = None, max_seq_len: int | None = None, stride: int | None = None,
         device: str | None = None, dtype: str | None = None, compile: bool | None = None,
         quantize: str | None = None, tensor_parallel: int = 1, json: bool = False):
    """Prints nats per token, perplexity and bits per UTF-8 byte of texts, of chats only the answers.

    Every token of a text is scored once, given those before it in its document; BOS, EOS and other special
    tokens aren't, nor is the first token where the model has no BOS. Inputs are what tiny_stories.py text
    reads. ValueError names a file and document that can't be read.

    Args:
        ckpt_dir: checkpoint directory, Meta's or Hugging Face's
        input: files, folders or patterns, one or several; files also gzipped (.gz)
        tokenizer_path: tokenizer.model or tokenizer.json to use; None: the checkpoint's own
        field: name of the text in objects and rows; another than text comes before chats and prompts
        separator: text between a .txt's documents, with \\n for a line break; None: each file is one
        max_seq_len: most tokens of a window; None: the model's own limit, but at most 2048
        stride: tokens that each further window of a long document scores; None: half a window
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        dtype: float32, bfloat16 or float16; None: what the device multiplies fast, with weights as stored
        compile: run faster; None: where it works; --nocompile: never
        quantize: int8, in half of bfloat16's memory
        tensor_parallel: processes that split one model, which one device can't hold
        json: print one JSON object, with documents, tokens, bytes, nats_per_token, perplexity, bits_per_byte
    """
    expect_at_least(2, max_seq_len=max_seq_len)
    expect_at_least(1, tensor_parallel=tensor_parallel)
    paths, _ = find_inputs(input)
    cli.expect(separator != "", "separator", "empty", "a text, such as \\n\\n")
    llama, share, shares = open_model(ckpt_dir, tokenizer_path, max_seq_len, device, dtype, compile,
                                      quantize, tensor_parallel)
    size = max_seq_len or min(llama.max_seq_len, 2048)
    stride = size // 2 if stride is None else stride
    cli.expect(1 <= stride < size, "stride", stride, f"1 to {size - 1}, less than a window")
    words = Words(llama.tokenizer)
    byte_lengths = np.array(llama.tokenizer.byte_lengths)
    total_bytes = sum(os.path.getsize(path) for path in paths)
    totals = np.zeros(4)  # documents, tokens, bytes, nats
    place = llama.model.device
    tokens_at_once = TOKENS_AT_ONCE * (1 if place.type == "cpu" else 8)

    def windows():
        documents = (record for path in paths for record in read_documents(path, field, separator))
        for number, record in enumerate(documents):
            if number % shares != share:
                continue
            stored = np.frombuffer(words.encode(record), "<u4")
            ids, is_target, _ = files.split_marks(stored, files.MARKING_VERSION)
            is_scored = is_target & (byte_lengths[ids] > 0)
            totals[0] += 1
            bar.update()
            if is_scored.any():
                end = is_scored.nonzero()[0][-1] + 1  # What comes later, such as EOS, needs no window.
                yield from windows_of(ids[:end].astype(np.int64), is_scored[:end], size, stride)

    with tqdm(unit="document") as bar:
        for batch in batches_of(windows(), tokens_at_once):
            caches = llama.new_caches(len(batch), max(len(window.ids) for window in batch))
            scored = np.concatenate([window.ids[window.is_scored] for window in batch])
            totals[1:] += len(scored), byte_lengths[scored].sum(), sum(nats_of(llama, batch, caches))
    # Those that split a model have all seen the same.
    sums = (parallel.sum_over_ranks(totals, place) / tensor_parallel).tolist()
    parallel.leave_process_group()
    documents, tokens, num_bytes = map(int, sums[:3])
    if tokens == 0:
        raise ValueError(f"{paths[0]}: found {documents} documents and no token to score in {total_bytes:,} "
                         "bytes, expected a text of two tokens at least")
    nats = sums[3] / tokens
    bits = sums[3] / math.log(2) / num_bytes
    perplexity = math.exp(min(nats, 700))  # Beyond it is more than a float holds.
    record = dict(documents=documents, tokens=tokens, bytes=num_bytes, nats_per_token=nats,
                  perplexity=perplexity, bits_per_byte=bits)
    show(f"{documents:,} documents, {tokens:,} tokens, {num_bytes:,} bytes: {nats:.4f} nats per token, "
         f"perplexity {perplexity:.3f}, {bits:.4f} bits per byte", record, json)

# -----------------------------------------------------------------------------
# Multiple choice


@streams.only_first_prints()
def choices(*, ckpt_dir: str, input: str, tokenizer_path: str | None = None, shots: int = 0,
            seed: int = 1337, max_seq_len: int | None = None, device: str | None = None,
            dtype: str | None = None, compile: bool | None = None, quantize: str | None = None,
            tensor_parallel: int = 1, json: bool = False):
    """Prints how often the right answer is the likeliest, of questions with several answers.

    Each answer is scored by its log-likelihood after the question: as it is, per UTF-8 byte, and per token.
    A row is as HellaSwag, ARC, PIQA, WinoGrande or MMLU are published, or has question, choices (a list) and
    answer (its index). ValueError names the file and the row.

    Args:
        ckpt_dir: checkpoint directory, Meta's or Hugging Face's
        input: .jsonl file with a question per row
        tokenizer_path: tokenizer.model or tokenizer.json to use; None: the checkpoint's own
        shots: answered questions before each, drawn from the other rows
        seed: draws them
        max_seq_len: most tokens of a question and an answer; None: the model's own limit
        device: cuda, cuda:1, mps or cpu; None: the first of these that is there
        dtype: float32, bfloat16 or float16; None: what the device multiplies fast, with weights as stored
        compile: run faster; None: where it works; --nocompile: never
        quantize: int8, in half of bfloat16's memory
        tensor_parallel: processes that split one model, which one device can't hold
        json: print one JSON object, with questions, accuracy, accuracy_per_byte, accuracy_per_token, stderr
    """
    expect_at_least(2, max_seq_len=max_seq_len)
    expect_at_least(1, tensor_parallel=tensor_parallel)
    expect_at_least(0, shots=shots)
    questions = read_questions(input)
    llama, share, shares = open_model(ckpt_dir, tokenizer_path, max_seq_len, device, dtype, compile,
                                      quantize, tensor_parallel)
    right = np.zeros(3)  # by log-likelihood as it is, per byte, per token
    for number in tqdm(range(share, len(questions), shares), unit="question"):
        question = questions[number]
        before = shots_before(questions, number, shots, seed)
        pairs = [pair_of(llama.tokenizer, before + context, ending)
                 for context, ending in zip(question.contexts, question.endings, strict=True)]
        if min(len(ids) - begin for ids, begin in pairs) < 1:
            raise ValueError(f"{input}, row {number + 1}: found a choice without a token of its own; "
                             "expected a text")
        nats = np.array(score_endings(llama, pairs))
        lengths = np.array([[1, len(ending.removeprefix(" ").encode()), len(ids) - begin]
                            for ending, (ids, begin) in zip(question.endings, pairs, strict=True)])
        right += (nats[:, None] / lengths).argmin(0) == question.answer
    sums = parallel.sum_over_ranks(right, llama.model.device) / tensor_parallel
    plain, per_byte, per_token = sums.tolist()
    parallel.leave_process_group()
    n = len(questions)
    accuracy = plain / n
    stderr = math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1))
    record = dict(questions=n, accuracy=accuracy, accuracy_per_byte=per_byte / n,
                  accuracy_per_token=per_token / n, stderr=stderr)
    show(f"{n:,} questions: accuracy {accuracy:.4f} (standard error {stderr:.4f}), per byte "
         f"{per_byte / n:.4f}, per token {per_token / n:.4f}", record, json)


if __name__ == "__main__":
    cli.run({"text": text, "choices": choices}, default=None)
