"""bfloat16 weights that learn: AdamW with stochastic rounding.

Near 1, the next bfloat16 is 1/128 away: rounded to the nearest, most updates would be lost. Rounded up or
down at random, as often up as it is near, each counts on average (Zamirai et al., 2020).
"""

import math

import numpy as np
import torch

from plumbing import parallel
from plumbing.fast import can_compile


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 weights and averages: computed in float32, rounded stochastically.

    The random numbers follow from the seed, the step, the parameter and the element's index in the whole
    tensor, so that a resumed run, and shards on any number of ranks, round alike.
    """

    def __init__(self, groups, lr, betas, seed, compile=True):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=1e-8, weight_decay=0.0))
        self.seed = seed
        device = self.param_groups[0]["params"][0].device
        # Compiled, it is one pass over memory; else pieces stay in the processor's caches.
        is_compiled = compile and can_compile(device)
        self.update = torch.compile(update, dynamic=True) if is_compiled else update_parts

    @torch.no_grad()
    def step(self, closure=None):
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                step = int(state["step"])
                beta1, beta2 = group["betas"]
                rates = torch.tensor([1 - group["lr"] * group["weight_decay"], beta1, 1 - beta1, beta2,
                                      1 - beta2, group["lr"] / (1 - beta1**step), 1 - beta2**step,
                                      group["eps"]], device=p.device)
                keys = np.random.SeedSequence([self.seed, step, number]).generate_state(4)
                keys = torch.from_numpy(keys.view(np.int32)).to(p.device)
                tensors = (p, p.grad, state["exp_avg"], state["exp_avg_sq"])
                self.update(*(local(tensor).view(-1) for tensor in tensors), rates, keys, first_element(p))


def update(weight, grad, mean, square, rates, keys, first):
    """One step of AdamW in place, on flat tensors that begin with element `first` of a whole one."""
    decay, beta1, rest1, beta2, rest2, rate, correction, eps = rates.unbind()
    g = grad.float()
    new_mean = beta1 * mean.float() + rest1 * g
    new_square = beta2 * square.float() + rest2 * g * g
    new_weight = decay * weight.float() - rate * new_mean / ((new_square / correction).sqrt() + eps)
    index = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device) + first
    bits = random_bits(index, keys[0], keys[1])
    weight.copy_(rounded(new_weight, bits))
    mean.copy_(rounded(new_mean, bits >> 16))
    square.copy_(rounded(new_square, random_bits(index, keys[2], keys[3])))


def update_parts(weight, grad, mean, square, rates, keys, first, size=2**16):
    """The same as update, a part of so many elements after the other."""
    for begin in range(0, weight.numel(), size):
        part = slice(begin, begin + size)
        update(weight[part], grad[part], mean[part], square[part], rates, keys, first + begin)


def random_bits(index, key1, key2):
    """32 random bits for each int32 index."""
    return scrambled(scrambled(index ^ key1) ^ key2)


def scrambled(x):
    """Wellons' lowbias32: each bit of an int32 changes about half of the result's."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7B935975
    return x ^ (x >> 16 & 0xFFFF)


def rounded(x, bits):
    """float32 -> a bfloat16 beside it, up as often as it is near that; bits: of an int32 the lower 16."""
    return ((x.view(torch.int32) + (bits & 0xFFFF)) & -0x10000).view(torch.float32).to(torch.bfloat16)


def local(tensor):
    """This rank's part of a tensor; all of it where it isn't sharded."""
    return tensor.to_local() if parallel.is_sharded(tensor) else tensor.detach()


def first_element(tensor):
    """The index in the whole tensor of the first element of this rank's part."""
    if not parallel.is_sharded(tensor):
        return 0
    offsets, _ = parallel.own_part(tensor)
    return offsets[0] * math.prod(tensor.shape[1:])  # Shards are rows.
