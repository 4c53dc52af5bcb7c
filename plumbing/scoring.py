"""Log-likelihoods: the nats of a text's tokens, window by window, and those of endings after a context."""

import itertools
import os
from dataclasses import dataclass

import numpy as np
import torch

from plumbing.sampling import NOT_FINITE

LOGITS_AT_ONCE = 2**24  # 64 MB in float32
WINDOWS_AT_HAND = 256  # Those of like lengths are found among so many.


@dataclass
class Window:
    """Token ids, and which of them are scored, given those before them; never the first."""
    ids: np.ndarray
    is_scored: np.ndarray


@torch.inference_mode()
def nats_of(llama, windows, caches, held=0):
    """The sum of the nats, -log p, of each window's scored tokens.

    caches: for all windows; they hold the first `held` tokens, the same of each window, of which the next
    ones alone are scored. ValueError if the model's logits aren't finite.
    """
    reader = llama.reader or llama.model
    device = llama.model.device
    shape = len(windows), max(len(window.ids) for window in windows) - 1 - held
    tokens = np.zeros(shape, dtype=np.int64)  # Padding comes last, where causality hides it.
    targets = np.zeros(shape, dtype=np.int64)
    is_scored = np.zeros(shape, dtype=bool)
    for row, window in enumerate(windows):
        length = len(window.ids) - 1 - held
        tokens[row, :length] = window.ids[held:-1]
        targets[row, :length] = window.ids[held + 1:]
        is_scored[row, :length] = window.is_scored[held + 1:]
    x = reader.extend(torch.from_numpy(tokens).to(device), [held] * len(windows), caches)
    is_scored = torch.from_numpy(is_scored).to(device)
    x = x[is_scored]  # (N, dim)
    targets = torch.from_numpy(targets).to(device)[is_scored]
    nats = []
    # The logits of all tokens at once would take more memory than anything else.
    for part, ids in zip(*(t.split(max(1, LOGITS_AT_ONCE // llama.model.args.vocab_size))
                           for t in (x, targets)), strict=True):
        logits = reader.head(part)
        nats.append(logits.logsumexp(-1) - logits.gather(1, ids[:, None])[:, 0])
    sums = torch.zeros(len(windows), dtype=torch.float64)
    # MPS has no float64: the numbers become that on the CPU.
    sums.index_add_(0, is_scored.nonzero()[:, 0].cpu(), torch.cat(nats).cpu().double())
    if not sums.isfinite().all():
        raise ValueError(NOT_FINITE)
    return sums.tolist()


def windows_of(tokens, is_scored, size, stride):
    """Yields the windows of a document, of at most `size` tokens, so that each token is scored once.

    The first one scores all it can, each later one at most `stride` tokens, behind the others as context.
    """
    scored = 1  # Nothing comes before the first token, which could foretell it.
    end = min(size, len(tokens))
    while True:
        begin = max(0, end - size)
        here = is_scored[begin:end].copy()
        here[:scored - begin] = False
        if here.any():
            yield Window(tokens[begin:end], here)
        if end == len(tokens):
            return
        scored = end
        end = min(end + stride, len(tokens))


def batches_of(windows, tokens_at_once):
    """Yields lists of windows of like lengths, of so many tokens together, padding included, or of one."""
    windows = iter(windows)
    while pool := list(itertools.islice(windows, WINDOWS_AT_HAND)):
        pool.sort(key=lambda window: len(window.ids))
        while pool:
            longest = len(pool[-1].ids)
            count = max(1, tokens_at_once // longest)
            yield pool[-count:]
            del pool[-count:]


def pair_of(tokenizer, context, ending):
    """(ids of context and ending, number of those of the context).

    As in EleutherAI's lm-eval, spaces at the context's end belong to the ending, whose tokens are those of
    the whole text behind as many as the context has alone. So where a token would join both, the context
    keeps its own tokens, and the ending may lose a character.
    """
    kept = context.rstrip()
    whole = tokenizer.encode(context + ending, bos=True)
    held = tokenizer.encode(kept, bos=True)
    ids = held + whole[len(held):]
    if not held:  # An empty context, and no BOS: something has to come before the first token.
        held = [tokenizer.eos_id]
        ids = held + whole
    return ids, len(held)


def score_endings(llama, pairs):
    """Nats of each ending, given its context; pairs: pair_of's. What all begin with is read once."""
    # As lm-eval does, a context that is too long loses its beginning. The last token is not read.
    most = llama.max_seq_len + 1
    cut = [(ids[-most:], begin - max(0, len(ids) - most)) for ids, begin in pairs]
    rows = [ids for ids, _ in cut]
    windows = [Window(np.array(ids), np.arange(len(ids)) >= max(begin, 1)) for ids, begin in cut]
    held = min(len(os.path.commonprefix(rows)), min(begin for _, begin in cut) - 1)
    longest = max(map(len, rows)) - 1
    caches = llama.new_caches(len(rows), longest)
    if held > 0:
        reader = llama.reader or llama.model
        with torch.inference_mode():
            shared = llama.new_caches(1, longest)
            prefix = torch.tensor([rows[0][:held]], device=llama.model.device)
            reader.extend(prefix, [0], shared)
            for cache, one in zip(caches, shared, strict=True):
                cache.k[:, :held] = one.k[:, :held]
                cache.v[:, :held] = one.v[:, :held]
    return nats_of(llama, windows, caches, max(held, 0))
