"""Our chunked loss beside torch's own, F.linear_cross_entropy with its default options, in float32.

    PYTHONPATH=. python docs/linear_cross_entropy.py WORDS TARGETS DIM ROUNDS [DEVICE]

Alternates both, forward and backward: median seconds, and gradients' errors by their largest entry. On a GPU
also the most memory that each has taken beside its inputs.
"""

import sys
import time

import torch
import torch.nn.functional as F

from plumbing.fast import chunked_cross_entropy


def theirs(x, weight, targets):
    chunked = torch.nn.LinearCrossEntropyOptions()  # None would make all logits at once.
    return F.linear_cross_entropy(x, weight, targets, reduction="sum", options=chunked)


def ours(x, weight, targets):
    return chunked_cross_entropy(x, weight, targets, torch.float32)


words, num_targets, dim, rounds = map(int, sys.argv[1:5])
device = torch.device(sys.argv[5] if len(sys.argv) > 5 else "cpu")
torch.manual_seed(0)
inputs = [torch.randn(num_targets, dim, device=device, requires_grad=True),
          torch.randn(words, dim, device=device).div(dim ** 0.5).requires_grad_()]
targets = torch.randint(words, (num_targets,), device=device)
x, weight = (tensor.double() for tensor in inputs)
exact = torch.autograd.grad(F.cross_entropy(x @ weight.T, targets, reduction="sum"), [x, weight])
seconds = {theirs: [], ours: []}
peaks = {}
for _ in range(rounds + 1):  # The first round warms up.
    for loss, times in seconds.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        found = torch.autograd.grad(loss(*inputs, targets), inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()
            peaks[loss] = f", {(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB"
        times.append(time.perf_counter() - start)
        if len(times) > rounds:
            error = max((f - e).abs().max() / e.abs().max() for f, e in zip(found, exact, strict=True))
            print(f"{loss.__name__}: {torch.tensor(times[1:]).median():.3f} s, gradients off by {error:.0e}"
                  f"{peaks.get(loss, '')}")
