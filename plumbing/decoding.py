"""Decoding where starting an operation takes longer than the operation: one static graph a token, on a GPU.

All shapes are fixed and everything that changes lies on the device: tokens, positions, random numbers. So
one recording of all operations, a CUDA graph, serves every token, and only the ids drawn come back.
"""

import copy
import math

import numpy as np
import torch
from torch import Tensor

from plumbing.attention import OneToken
from plumbing.cli import expect

NOT_FINITE = "the logits are not all finite; take --dtype float32, or sound weights"


def check_prompts(llama, prompt_tokens, start_pos):
    """Raises ValueError naming a prompt that is empty, too long, all in the cache, or has a bad id."""
    B = len(prompt_tokens)
    max_seq_len = llama.max_seq_len
    if not 0 < B <= llama.max_batch_size:
        raise ValueError(f"{B} prompts; expected 1 to {llama.max_batch_size}, which is max_batch_size")
    for i, (prompt, held) in enumerate(zip(prompt_tokens, start_pos, strict=True)):
        if not 0 < len(prompt) < max_seq_len:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; expected 1 to {max_seq_len - 1}, one "
                             "fewer than max_seq_len: shorten it, or raise --max_seq_len")
        if not 0 <= min(prompt) <= max(prompt) < llama.num_ids:
            raise ValueError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}; expected 0 to "
                             f"{llama.num_ids - 1}")
        expect(0 <= held < len(prompt), f"start_pos of prompt {i}", held,
               f"0 to {len(prompt) - 1}: at least its last token is to be read")


def unread(texts, start_pos, device):
    """What texts, lists of ids, have from start_pos on: (B, T), zeros behind it; and each row's last column.
    """
    rows = [text[begin:] for text, begin in zip(texts, start_pos, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return tokens, [len(row) - 1 for row in rows]


class StaticReader:
    """A model with compiled blocks, which reads prompts, and draws the tokens behind them.

    model: a Transformer. It works on a CPU, too, without a recording.
    """

    def __init__(self, model):
        self.model = model

    def head(self, x):
        """As Transformer.head."""
        return self.model.head(x)

    def extend(self, tokens, start_pos, caches):
        """As Transformer.extend."""
        size = max(start_pos) + tokens.size(1)
        return self.model.extend(tokens, start_pos, [first_columns(cache, size) for cache in caches])

    def draws(self, texts, ended, start_pos, caches, sampler, uniforms, num_ids):
        """As Llama.draws, with the same ids; rows that have ended go on, and nobody looks at them."""
        device = self.model.device
        room = caches[0].k.size(1)
        longest = max(map(len, texts))
        step = Step(self.model, caches, sampler, uniforms.to(device), texts, num_ids)
        for count in range(uniforms.size(1)):
            if count == 0:
                tokens, last = unread(texts, start_pos, device)
                step.draw(self.model.forward_cached(tokens, start_pos, caches, last, self))
            else:
                # Powers of two, so that few sizes are recorded.
                step.run(min(room, 2 ** max(8, (longest + count - 1).bit_length())))
            ids = step.ids.tolist()  # The host waits here, and nowhere else.
            if -1 in ids:
                raise ValueError(NOT_FINITE)
            yield step.logits.clone(), ids


class Step:
    """What one token after the other needs, at fixed places on the device, and what is done with it."""

    def __init__(self, model, caches, sampler, uniforms, texts, num_ids):
        device = uniforms.device
        B = len(texts)
        self.model = model
        self.caches = caches
        self.sampler = sampler
        self.uniforms = uniforms
        self.last_position = caches[0].k.size(1) - 1
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # tokens drawn for each row
        self.positions = torch.tensor([[len(text) - 1] for text in texts], device=device)  # (B, 1)
        self.tokens = torch.tensor([[text[-1]] for text in texts], device=device)  # at these positions
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)  # drawn behind them
        self.logits = torch.empty(B, model.args.vocab_size, device=device)
        self.rows = torch.arange(B, device=device)
        self.seen = None
        if sampler.repetition_penalty != 1:
            self.seen = torch.zeros(B, num_ids, dtype=torch.bool, device=device)
            for row, text in zip(self.seen, texts, strict=True):
                row[torch.tensor(text, device=device)] = True
        self.num_ids = num_ids
        self.size = 0  # columns of the cache that the recording attends to
        self.recording = None

    def run(self, size):
        """One token more for each row; the first `size` columns of the caches hold them all."""
        if not self.uniforms.is_cuda:
            self.extend(size)
            return
        if size != self.size:
            self.record(size)
        self.recording.replay()

    def record(self, size):
        """Records extend for a number of columns, and leaves everything as it was."""
        state = (self.count, self.positions, self.tokens, self.ids)
        state += () if self.seen is None else (self.seen,)
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.extend(size)  # compiles what isn't yet, and lets libraries take their memory
        torch.cuda.current_stream().wait_stream(stream)
        self.recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.recording):
            self.extend(size)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)
        self.size = size

    def extend(self, size):
        """Reads the tokens drawn last, and draws the next ones."""
        # Where the cache ends, a row feeds its last token to its last position again.
        goes_on = self.positions < self.last_position
        self.tokens.copy_(torch.where(goes_on, self.ids[:, None], self.tokens))
        self.positions.add_(goes_on)
        columns = torch.arange(size, device=self.positions.device)
        caches = [first_columns(cache, size) for cache in self.caches]
        for cache in caches:
            cache.seek(self.positions, columns)
        mask = OneToken((columns <= self.positions[..., None])[:, None])
        x = self.model.trunk(self.tokens, self.positions, mask, caches)
        self.draw(self.model.head(x[:, 0]))

    def draw(self, logits):
        """Draws an id for each row of logits (B, V)."""
        self.logits.copy_(logits)
        uniform = self.uniforms.index_select(1, self.count[None])[:, 0]
        self.ids.copy_(drawn(self.logits[:, :self.num_ids], uniform, self.sampler, self.seen))
        if self.seen is not None:
            self.seen[self.rows, self.ids.clamp(min=0)] = True
        self.count.add_(1)


def first_columns(cache, size):
    """A KVCache that is the first columns of another one.

    Compiled for whole caches, a block that has seen one as large as its columns fails where another isn't.
    """
    part = copy.copy(cache)
    part.k = cache.k[:, :size]
    part.v = cache.v[:, :size]
    return part


def drawn(logits: Tensor, uniform: Tensor, sampler, seen: Tensor | None = None) -> Tensor:
    """The ids (B,) that a Sampler draws from logits (B, V) with numbers (B,); -1 where one isn't finite.

    seen (B, V), bool: the ids that a row's text has, for a repetition penalty.
    """
    scores = logits
    if seen is not None:
        penalty = sampler.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    is_finite = logits.sum(1).isfinite()
    if sampler.temperature < 1e-6:
        return torch.where(is_finite, scores.argmax(1), -1)
    largest = scores.amax(1, keepdim=True)
    weights = ((scores - largest) / sampler.temperature).exp().double()  # the likeliest has 1
    is_kept = weights >= sampler.min_p
    if sampler.top_p < 1 or sampler.top_k:
        total = weights.sum(1, keepdim=True)
        # Stable, it leaves of equals the lower id first.
        ranked, order = weights.sort(dim=1, descending=True, stable=True)
        held = ranked.cumsum(1)
        # A token is dropped when the likelier ones alone already hold top_p.
        likely = torch.ones_like(is_kept)
        if sampler.top_p < 1:
            likely[:, 1:] = held[:, :-1] < sampler.top_p * total
        if sampler.top_k:
            likely[:, sampler.top_k:] = False
        is_kept &= torch.zeros_like(is_kept).scatter(1, order, likely)
    cdf = (weights * is_kept).cumsum(1)
    ids = torch.searchsorted(cdf, (uniform[:, None] * cdf[:, -1:]), right=True)[:, 0]
    return torch.where(is_finite, ids, -1)

# -----------------------------------------------------------------------------
# A sampler's limits on the CPU, by NumPy, whose operations begin within a microsecond. Their number counts,
# because a step of the model drives the code of each from the processor's caches.


def penalized(scores, text, penalty):
    """Logits (V,) with a text's tokens made less likely, each once (Keskar et al., 2019)."""
    ids = np.fromiter(set(text), dtype=np.int64)
    scores = scores.copy()
    held = scores[ids]
    # Dividing a negative logit would make its token likelier.
    scores[ids] = np.where(held < 0, held * penalty, held / penalty)
    return scores


def candidates(scores, largest, sampler):
    """(ids, ascending; float64 weights) of the tokens of logits (V,) that a Sampler's limits leave.

    largest: the largest of the logits. Weights are probabilities times a constant, with which the likeliest
    token has 1.
    """
    # The exponentials of all V tokens take longest, and nearly always those near the likeliest suffice: the
    # others, each below exp(-20), can't hold enough to change what top_p leaves.
    for reach in (20.0, math.inf) if sampler.top_p < 1 else (math.inf,):
        near, = (scores >= largest - reach * sampler.temperature).nonzero()
        weights = np.exp((scores[near] - largest) / np.float32(sampler.temperature))
        weights = weights.astype(np.float64)  # in which sums are exact enough
        rest = 2 * (len(scores) - len(near)) * math.exp(-reach)  # more than the others hold together
        ids = kept(weights, sampler.top_p, sampler.top_k, sampler.min_p, rest)
        if len(ids) > 0:
            break
    return near[ids], weights[ids]


def kept(weights, top_p, top_k, min_p, rest=0.0):
    """Which tokens a sampler's limits leave, ascending; none if that depends on others.

    weights: probabilities times a constant, the largest of which is 1. rest: the most that the others hold.
    """
    total = weights.sum()
    # Sorting all of V is slow: those rarer than this hold less than 1 - top_p together (0.9: rounding).
    rare = 0.9 * (1 - top_p) / len(weights) * total
    ids, = (weights >= max(rare, min_p)).nonzero()
    if top_p == 1 and top_k == 0:
        return ids
    ids = ids[(-weights[ids]).argsort(kind="stable")]  # the likeliest first; of equals, the lower id
    if top_p < 1:
        # A token is dropped when the likelier ones alone already hold top_p.
        held = weights[ids].cumsum()
        count = held.searchsorted(top_p * total) + 1
        most = held.searchsorted(top_p * (total + rest)) + 1
        # Where it is all of these, the rare ones might be left, too.
        if most > count and (count < len(ids) or rare > min_p):
            return ids[:0]
        ids = ids[:count]
    ids = ids[:top_k or None]
    ids.sort()
    return ids
