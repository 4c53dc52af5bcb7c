"""Attention where PyTorch's own is slow: on a GPU to documents and to a cache, in training on a CPU.

On a CPU attention.cpp computes it, forward and backward. Here that becomes an operator, which autograd and
torch.compile know how to handle.
"""

import ctypes
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from plumbing.compiler import Address, compile_library


class OneToken(NamedTuple):
    """The mask of a single new token a row, which may see some of a cache: seen (B, 1, 1, S), bool."""
    seen: Tensor


def has_kernel(mask):
    """Whether attend takes a mask: document_block_mask's, first_seen's, OneToken, but neither None nor bool.
    """
    return isinstance(mask, BlockMask | OneToken) or (mask is not None and mask.dtype == torch.int64)


def attend(q, k, v, mask, is_grouped):
    """Attention of q (B, H, T, D) to k and v (B, K, S, D) -> (B, H, T, D); mask: see has_kernel."""
    if isinstance(mask, OneToken):
        # Heads that share keys take the places of tokens, so that no key is repeated in memory.
        q = q.unflatten(1, (k.size(1), -1)).flatten(2, 3)  # (B, K, H/K, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.seen).flatten(1, 2)[:, :, None]
    if isinstance(mask, BlockMask):
        flex = compiled_flex_attention() if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=mask, enable_gqa=is_grouped)
    y, _ = attend_on_cpu(*(t.transpose(1, 2) for t in (q, k, v)), mask)
    return y.transpose(1, 2)

# -----------------------------------------------------------------------------
# On a GPU


@functools.cache
def compiled_flex_attention():
    """Compiled once: uncompiled, flex attention would materialize all T x S scores."""
    return torch.compile(flex_attention)


@functools.cache
def compiled_create_block_mask():
    """Compiled once: uncompiled, it would materialize all T x T booleans."""
    return torch.compile(create_block_mask)


def document_block_mask(document):
    """The BlockMask of causal attention within documents; document: (B, T), the number of each token's."""
    def attended(b, h, i, j):
        return (document[b, i] == document[b, j]) & (i >= j)
    B, T = document.shape
    create = compiled_create_block_mask() if document.is_cuda else create_block_mask
    return create(attended, B, None, T, T, device=document.device)

# -----------------------------------------------------------------------------
# On a CPU


def first_seen(tokens, starts):
    """(B, T) int64, the first position that each of the tokens (B, T) sees: its document's.

    starts: (B, T), True where a document begins; None: nowhere but at 0.
    """
    if starts is None:
        return torch.zeros_like(tokens)
    positions = torch.arange(tokens.size(1), device=tokens.device)
    return torch.where(starts, positions, 0).cummax(1).values


@functools.cache
def compile_kernels():
    """attention.cpp as a ctypes library; see compile_library."""
    library = compile_library(Path(__file__).resolve().with_name("attention.cpp"))
    sizes = [ctypes.c_int64] * 5
    library.attend.argtypes = sizes + [Address] * 6
    library.attend_backward.argtypes = sizes + [Address] * 10
    return library


def serves(device):
    """Whether attention.cpp serves a device; if not on a CPU, a line on standard error says why."""
    if device.type != "cpu":
        return False
    try:
        compile_kernels()
    except OSError as error:
        print(f"{error}; attention is computed by PyTorch", file=sys.stderr)
        return False
    return True


def sizes_of(q, k):
    """B, T, H, K, D."""
    return *q.shape[:3], *k.shape[2:]


def as_floats(*tensors):
    return [t.float().contiguous() for t in tensors]


@torch.library.custom_op("llama31::attend", mutates_args=(), device_types="cpu")
def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of q (B, T, H, D) to k and v (B, T, K, D) -> y, as q, and logsum (B, H, T), float32.

    first: first_seen's. logsum: the logarithm of each row's sum of exponentials. All sums are float32.
    """
    y, logsum = empty_results(q, k, v, first)
    y_floats = y.float()
    compile_kernels().attend(*sizes_of(q, k), *as_floats(q, k, v), first, y_floats, logsum)
    return y.copy_(y_floats), logsum


@attend_on_cpu.register_fake
def empty_results(q, k, v, first):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("llama31::attend_backward", mutates_args=(), device_types="cpu")
def gradients_on_cpu(q: Tensor, k: Tensor, v: Tensor, first: Tensor, y: Tensor, logsum: Tensor,
                     dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given that of y."""
    floats = as_floats(q, k, v, y, dy)
    gradients = [torch.empty_like(t) for t in floats[:3]]
    compile_kernels().attend_backward(*sizes_of(q, k), *floats[:3], first, floats[3], logsum, floats[4],
                                      *gradients)
    return tuple(gradient.to(q.dtype) for gradient in gradients)


@gradients_on_cpu.register_fake
def empty_gradients(q, k, v, first, y, logsum, dy):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, dy, dlogsum):
    return *gradients_on_cpu(*ctx.saved_tensors, dy), None


attend_on_cpu.register_autograd(backward, setup_context=keep)
