"""Weights of fewer bits than the arithmetic: widened for each product, or int8 with scales.

A processor that multiplies bfloat16 slowly need not hold the weights in twice the memory: they are widened
for each product, so many at a time that these stay in its cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.devices import name_of

WIDENED_ENTRIES = 2**18  # 1 MB in float32


class WideLinear(nn.Linear):
    """Linear that multiplies in its inputs' type, in which each of its weights can be written, too."""

    def __init__(self, weight):
        nn.Module.__init__(self)  # nn.Linear's would draw weights first, which takes a while even on meta.
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, x):
        rows = max(1, WIDENED_ENTRIES // x.size(-1))
        return torch.cat([F.linear(x, piece.to(x.dtype)) for piece in self.weight.split(rows)], -1)


class WideEmbedding(nn.Embedding):
    """The embedding, whose rows are widened to dtype as they are looked up."""

    def __init__(self, weight, dtype):
        super().__init__(*weight.shape, _weight=weight)
        self.weight = weight  # the parameter itself, which the output may share
        self.dtype = dtype

    def forward(self, tokens):
        if torch.is_grad_enabled() and self.weight.requires_grad:
            # The gradients of a token that is there often are to be summed in dtype, too.
            return F.embedding(tokens, self.weight.to(self.dtype))
        return super().forward(tokens).to(self.dtype)


def widen(model, dtype):
    """Lets a model multiply in dtype, and leaves its weights in the type that they have."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            model.set_submodule(name, WideEmbedding(module.weight, dtype))
        if isinstance(module, nn.Linear):
            model.set_submodule(name, WideLinear(module.weight))
    model.compute_dtype = dtype

# -----------------------------------------------------------------------------
# Int8 weights

GROUP = 64  # Weights of a row that share a scale; one scale for a whole row would cost 1% of perplexity.


def quantize(weight):
    """weight (out, in) -> integers in [-127, 127], int8 (out, in), and scales, float32 (out, groups).

    Every GROUP weights of a row share a scale; a last group may have fewer. A few rows go at a time, as
    their floats take four times the memory of what they become.
    """
    out, size = weight.shape
    quantized = torch.empty(out, size, dtype=torch.int8, device=weight.device)
    scale = torch.empty(out, math.ceil(size / GROUP), device=weight.device)
    rows = max(1, WIDENED_ENTRIES // size)
    for w, q, s in zip(weight.split(rows), quantized.split(rows), scale.split(rows), strict=True):
        largest = torch.stack([group.abs().amax(1) for group in w.float().split(GROUP, 1)], 1)
        s.copy_(largest.clamp(min=1e-30) / 127)
        q.copy_((w / spread(s, size)).round())
    return quantized, scale


def spread(scale, size):
    """Scales (rows, groups) -> (rows, size), one for each weight."""
    # repeat_interleave and a slice would read beyond the scales' end where torch.compile 2.13 makes them.
    return scale.index_select(1, torch.arange(size, device=scale.device) // GROUP)


def dequantize(quantized, scale):
    """The float32 values (out, in) that integers and scales stand for."""
    size = quantized.size(1)
    if size % GROUP:  # The last group is a smaller one.
        return quantized * spread(scale, size)
    groups = quantized.float().unflatten(1, (-1, GROUP))  # Of whole groups, each scale is read once.
    return groups.mul_(scale[..., None]).flatten(1)


class Int8Weight(nn.Module):
    """A matrix in half of bfloat16's memory. `weight`, in a state dict too, are its values in dtype."""

    def __init__(self, quantized, scale, dtype):
        super().__init__()
        self.register_buffer("quantized", quantized, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.dtype = dtype
        self.register_state_dict_post_hook(save_values)

    @property
    def weight(self):
        return dequantize(self.quantized, self.scale).to(self.dtype)


def save_values(module, state, prefix, metadata):
    state[f"{prefix}weight"] = module.weight


class Int8Linear(Int8Weight):
    """Linear with int8 weights."""

    def forward(self, x):
        if not x.is_cpu:
            return self.multiply_compiled(x)
        rows = max(1, WIDENED_ENTRIES // x.size(-1))
        pieces = zip(self.quantized.split(rows), self.scale.split(rows), strict=True)
        return torch.cat([F.linear(x, dequantize(*piece).to(x.dtype)) for piece in pieces], -1)

    def multiply_compiled(self, x):
        """The product as torch.compile makes it best: with one token, of int8 weights as they are read."""
        if x.numel() == x.size(-1):
            return (x.float() * self.weight).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.weight.to(x.dtype))


class Int8Embedding(Int8Weight):
    """The embedding with int8 weights: it dequantizes only the rows it looks up."""

    def forward(self, tokens):
        rows = dequantize(self.quantized[tokens.flatten()], self.scale[tokens.flatten()])
        return rows.to(self.dtype).unflatten(0, tokens.shape)


def load_int8(model, tensors, device, dtype):
    """Gives a model on the meta device its weights, from (name, tensor) pairs, matrices as int8."""
    for name, tensor in tensors:
        path = name.removesuffix(".weight")
        tensor = tensor.to(device)
        if tensor.dim() == 1:
            model.get_submodule(path).weight = nn.Parameter(tensor.to(dtype))
            continue
        kind = Int8Embedding if path == "tok_embeddings" else Int8Linear
        model.set_submodule(path, kind(*quantize(tensor), dtype))
    if model.args.tie_word_embeddings:
        model.output = Int8Linear(model.tok_embeddings.quantized, model.tok_embeddings.scale, dtype)
    model.compute_dtype = dtype


def weight_type(model):
    """The name of the type in which a model's matrices are kept."""
    return "int8" if isinstance(model.output, Int8Linear) else name_of(model.output.weight.dtype)
