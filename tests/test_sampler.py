"""The sampler against a plain one: the same distribution for every setting, exact where it is extreme."""

import math
from random import Random

import pytest
import torch

from llama31 import Sampler

DRAWS = 2000
BELOW_1 = 1 - 2**-53  # the largest uniform number


def plain_probabilities(logits, text, temperature, top_p, top_k, min_p, repetition_penalty):
    """Each token's probability in float64, token by token, as the papers describe the limits."""
    scores = logits.double().tolist()
    for token in set(text):
        scores[token] *= repetition_penalty if scores[token] < 0 else 1 / repetition_penalty
    top = max(scores)
    weights = [math.exp((score - top) / temperature) for score in scores]
    total = sum(weights)
    kept = {}
    likelier = 0.0  # the probability of those before
    for token in sorted(range(len(weights)), key=lambda token: (-weights[token], token)):
        is_first = not kept
        if is_first or (likelier < top_p and (not top_k or len(kept) < top_k) and weights[token] >= min_p):
            kept[token] = weights[token]
        likelier += weights[token] / total
    total_kept = sum(kept.values())
    return [kept.get(token, 0.0) / total_kept for token in range(len(weights))]


def chi_square_bound(freedom):
    """A bound that chi-square exceeds about once in 10,000 times (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.72 * spread ** 0.5) ** 3


SETTINGS = [dict(temperature=t, top_p=p, top_k=k, min_p=m, repetition_penalty=r)
            for t in (0.3, 0.6, 1.0, 2.0) for p in (0.5, 0.9, 1.0) for k in (0, 3, 40) for m in (0.0, 0.1)
            for r in (1.0, 1.4)]


@pytest.mark.parametrize("chosen", [SETTINGS[::7], pytest.param(SETTINGS, marks=pytest.mark.slow)])
def test_draws_have_the_plain_distribution_for_all_settings(chosen):
    generator = torch.Generator().manual_seed(0)
    random = Random(0).random
    for settings in chosen:
        logits = torch.randn(60, generator=generator) * 2
        text = [3, 5, 5, int(logits.argmax())]
        expected = plain_probabilities(logits, text, **settings)
        sampler = Sampler(**settings)
        counts = [0] * len(logits)
        for _ in range(DRAWS):
            counts[sampler(logits, random(), text)] += 1
        assert all(p > 0 for p, count in zip(expected, counts, strict=True) if count), settings
        # Rare tokens share a cell, as chi-square is for cells that five draws or more are expected in.
        cells = [(DRAWS * p, count) for p, count in zip(expected, counts, strict=True) if DRAWS * p >= 5]
        rest = DRAWS - sum(e for e, _ in cells)
        if rest >= 5:
            cells.append((rest, DRAWS - sum(count for _, count in cells)))
        chi_square = sum((count - e) ** 2 / e for e, count in cells)
        assert len(cells) == 1 or chi_square < chi_square_bound(len(cells) - 1), settings


@pytest.mark.parametrize("vocab_size", [1, 2, 1000])
def test_equal_logits_are_kept_and_drawn_in_the_order_of_their_ids(vocab_size):
    logits = torch.zeros(vocab_size)
    for top_k in (1, 2, 999):
        random = Random(0).random
        drawn = {Sampler(top_k=top_k, top_p=1.0, temperature=1.0)(logits, random()) for _ in range(200)}
        assert drawn <= set(range(min(top_k, vocab_size)))
    assert Sampler(temperature=0.0)(logits) == 0


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(top_p=0.0), dict(top_k=1), dict(min_p=1.0),
                                      dict(temperature=1e-5), dict(temperature=1e-9)])
def test_settings_that_keep_one_token_take_the_likeliest(settings):
    generator = torch.Generator().manual_seed(0)
    for uniform in (0.0, 0.5, BELOW_1):
        logits = torch.randn(5000, generator=generator)
        assert Sampler(**settings)(logits, uniform) == int(logits.argmax())


def test_tokens_of_minus_infinity_change_nothing_for_the_others():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100, generator=generator)
    banned = torch.cat([torch.full((50,), -math.inf), logits, torch.full((50,), -math.inf)])
    for settings in SETTINGS:
        sampler = Sampler(**settings | dict(repetition_penalty=1.0))
        for uniform in (0.0, *(i / 20 for i in range(1, 20)), BELOW_1):
            assert sampler(banned, uniform) == sampler(logits, uniform) + 50


@pytest.mark.parametrize("largest", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.0), dict(repetition_penalty=1.2)])
def test_a_largest_logit_that_is_not_finite_is_an_error(largest, settings):
    logits = torch.full((9,), largest) if largest == -math.inf else torch.tensor([0.0, largest, 1.0])
    with pytest.raises(ValueError, match="largest logit; expected a finite one"):
        Sampler(**settings)(logits, 0.5, [0])


def test_the_extreme_uniform_numbers_draw_the_first_and_the_last_kept():
    for settings in SETTINGS:
        logits = torch.randn(500, generator=torch.Generator().manual_seed(1))
        text = [int(logits.argmax())]
        expected = plain_probabilities(logits, text, **settings)
        kept = [token for token, p in enumerate(expected) if p > 0]
        sampler = Sampler(**settings)
        assert sampler(logits, 0.0, text) == kept[0]
        last = sampler(logits, BELOW_1, text)
        assert last in kept and sum(expected[last + 1:]) < 1e-15  # Rarer ones round away.


def test_without_limits_a_token_of_tiny_probability_can_be_drawn():
    logits = torch.tensor([0.0, -21.0])
    assert Sampler(temperature=1.0, top_p=1.0)(logits, BELOW_1) == 1


def test_a_seed_is_below_the_bound_that_its_error_names():
    assert Sampler(seed=2**62 - 1).seed == 2**62 - 1
    with pytest.raises(ValueError, match="seed is 4611686018427387904; expected 0 to"):
        Sampler(seed=2**62)
