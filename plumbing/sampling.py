"""What generation takes besides the model: prompts, laid out, and a Sampler's limits, by NumPy.

NumPy's operations begin within a microsecond. Their number counts, because a step of the model drives the
code of each from the processor's caches.
"""

import math

import numpy as np
import torch

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


def unread(rows, start_pos, device):
    """What rows of ids have from start_pos on: (B, T), zeros behind it; and the last column of each."""
    parts = [row[begin:] for row, begin in zip(rows, start_pos, strict=True)]
    width = max(map(len, parts))
    tokens = torch.tensor([[*part, *[0] * (width - len(part))] for part in parts], device=device)
    return tokens, [len(part) - 1 for part in parts]


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
