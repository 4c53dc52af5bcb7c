"""Decoding where starting an operation takes longer than the operation: one static graph a token, on a GPU.

All shapes are fixed and everything that changes lies on the device: tokens, positions, random numbers. So
one recording of all operations, a CUDA graph, serves every token, and only the ids drawn come back.
"""

import copy

import torch
from torch import Tensor

from plumbing.attention import OneToken
from plumbing.sampling import NOT_FINITE, unread


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

    def draws(self, rows, ended, start_pos, caches, sampler, uniforms, num_ids):
        """As Llama.draws, with the same ids; rows that have ended go on, and nobody looks at them."""
        device = self.model.device
        room = caches[0].k.size(1)
        longest = max(map(len, rows))
        step = Step(self.model, caches, sampler, uniforms.to(device), rows, num_ids)
        for count in range(uniforms.size(1)):
            if count == 0:
                tokens, last = unread(rows, start_pos, device)
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

    def __init__(self, model, caches, sampler, uniforms, rows, num_ids):
        device = uniforms.device
        B = len(rows)
        self.model = model
        self.caches = caches
        self.sampler = sampler
        self.uniforms = uniforms
        self.last_position = caches[0].k.size(1) - 1
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # tokens drawn for each row
        self.positions = torch.tensor([[len(row) - 1] for row in rows], device=device)  # (B, 1)
        self.tokens = torch.tensor([[row[-1]] for row in rows], device=device)  # at these positions
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)  # drawn behind them
        self.logits = torch.empty(B, model.args.vocab_size, device=device)
        self.rows = torch.arange(B, device=device)
        self.seen = None
        if sampler.repetition_penalty != 1:
            self.seen = torch.zeros(B, num_ids, dtype=torch.bool, device=device)
            for seen, row in zip(self.seen, rows, strict=True):
                seen[torch.tensor(row, device=device)] = True
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

    seen (B, V), bool: the ids that a row has, for a repetition penalty.
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
