"""Finetuning in little memory: low-rank adapters on a frozen base, and bfloat16 weights that learn.

W x becomes W x + (alpha / rank) B A x with a frozen W (out, in), a trained A (rank, in) and B (out, rank),
as in LoRA (Hu et al., 2021); W may be int8, as in QLoRA (Dettmers et al., 2023). Only the names of tensors
are known here: a model is a value with layers. bfloat16 weights learn by the optimizer of
plumbing/rounding.py.
"""

import functools
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import checkpoint, huggingface, mapped
from plumbing.adapters import MATRICES, load_adapters, save_adapters
from plumbing.cli import expect, expect_at_least
from plumbing.devices import name_of
from plumbing.fast import product_dtype
from plumbing.narrow import GROUP, dequantize, quantize, widen

# -----------------------------------------------------------------------------
# Products with weights as they are stored


class WidenedProduct(torch.autograd.Function):
    """x (..., in) times a weight (out, in) of any stored type, int8 with its scales -> (..., out).

    The weight is widened to x's type for the product, and again for that of the backward pass, so that no
    widened copy is kept. A frozen one gets no gradient, and x isn't kept for it.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, scale)
        return F.linear(x, widened(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x = None
        grad_weight = None
        if ctx.needs_input_grad[0]:  # Below the first layer nothing may learn.
            grad_x = grad @ widened(weight, scale, grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight, None


def widened(weight, scale, dtype):
    """A stored matrix in dtype; scale: of int8, else None."""
    values = weight if scale is None else dequantize(weight, scale)
    return values.to(dtype)


class StoredLinear(nn.Module):
    """Linear whose weight is trained in the type that it is stored in."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return WidenedProduct.apply(x.to(product_dtype(x)), self.weight, None)


class AdaptedLinear(nn.Module):
    """Linear with a frozen weight, in its stored type or int8, and a trained adapter in float32."""

    def __init__(self, weight, rank, alpha, quantize):
        super().__init__()
        size_out, size_in = weight.shape
        scale = None
        if quantize:
            weight = torch.empty(size_out, size_in, dtype=torch.int8)
            scale = nn.Parameter(torch.empty(size_out, math.ceil(size_in / GROUP)), requires_grad=False)
        # Parameters even where they are int8: FSDP shares out no buffers, and DDP would send them each step.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("scale", scale)
        self.lora_a = nn.Parameter(torch.empty(rank, size_in))
        self.lora_b = nn.Parameter(torch.empty(size_out, rank))
        self.factor = alpha / rank

    def forward(self, x):
        rows = x.to(product_dtype(x)).flatten(0, -2)
        low = F.linear(rows, self.lora_a)  # (N, rank)
        y = torch.addmm(WidenedProduct.apply(rows, self.weight, self.scale), low, self.lora_b.T,
                        alpha=self.factor)
        return y.unflatten(0, x.shape[:-1])

# -----------------------------------------------------------------------------
# Models


def prepare(model, stored, param_dtype, rank, alpha, quantize, base):
    """Gives a model on the meta device the form in which it is trained; its weights come from files.

    stored: their type. rank 0: all of them are trained in param_dtype; else see adapt. alpha None: twice the
    rank. quantize: "int8" or None. base: the model's path. Returns what saves what is trained, as
    save_checkpoint does, its type, and a line on it. ValueError where settings don't fit together.
    """
    expect(param_dtype in ("float32", "bfloat16"), "param_dtype", param_dtype, "float32 or bfloat16")
    expect(quantize in (None, "int8"), "quantize", repr(quantize), "int8 or None")
    expect(alpha is None or 0 < alpha < math.inf, "lora_alpha", alpha, "a number above 0")
    if rank > 0:
        expect(param_dtype == "float32", "param_dtype", param_dtype, "float32, the type of adapters")
        return adapt(model, rank, alpha or 2 * rank, stored, quantize, base)
    expect(quantize is None, "quantize", quantize, "--lora_rank, too: only frozen weights can be int8")
    expect(alpha is None, "lora_alpha", alpha, "--lora_rank, too")
    remark = ""
    if param_dtype == "bfloat16":
        store_as(model, torch.bfloat16)
        remark = "weights, gradients and averages in bfloat16, rounded stochastically"
    return checkpoint.save_checkpoint, stored, remark


def store_as(model, dtype):
    """Lets a model keep its weights in dtype, and widen them for each product."""
    model.to(dtype)
    replace_linears(model, StoredLinear)


def replace_linears(model, kind):
    """Puts kind(weight) in place of each matrix of the layers, and widens embedding and output."""
    for layer in model.layers:
        for name in MATRICES:
            layer.set_submodule(name, kind(layer.get_submodule(name).weight))
    widen(model, torch.float32)


def adapt(model, rank, alpha, stored, quantize, base):
    """Freezes a model in its stored type, the layers' matrices perhaps in int8, and puts adapters on these.

    See prepare.
    """
    count = sum(p.numel() for p in model.parameters())
    model.to(stored).requires_grad_(False)
    with torch.device("meta"):
        replace_linears(model, lambda weight: AdaptedLinear(weight, rank, alpha, quantize))
    kinds = name_of(stored) + (", matrices of layers in int8" if quantize else "")
    save = functools.partial(save_adapters, alpha=alpha, base=os.path.abspath(base))
    return save, torch.float32, f"adapters of rank {rank} on {count:,} frozen parameters in {kinds}"


def base_files(rank, ckpt_dir):
    """The files of weights that adapters of that rank are put on; none at 0. ValueError without a model."""
    expect_at_least(0, lora_rank=rank)
    expect(rank == 0 or ckpt_dir, "lora_rank", rank, "--ckpt_dir, too: adapters need a finished model")
    if rank == 0:
        return []
    layout = huggingface if huggingface.is_hugging_face(ckpt_dir) else checkpoint
    return layout.weight_files(Path(ckpt_dir))


def is_adapted(model):
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


def adapted_tensors(model, tensors, seed, newest=None):
    """Yields (name, tensor or Pieces) of an adapted model: its base's, quantized where it is, and adapters.

    tensors: mapped.pop_pieces', or whole ones. newest: a folder of adapters to go on with; None: A is drawn
    as PEFT does, on all ranks alike, B is zero.
    """
    layout = model.state_dict()
    adapters, _ = load_adapters(newest, model.args, layout) if newest else ({}, None)
    for name, tensor in tensors:
        if layout[name].dtype == torch.int8:
            tensor, scale = quantize(mapped.Pieces.of(name, tensor).whole())
            yield name.removesuffix("weight") + "scale", scale
        yield name, tensor
    generator = torch.Generator().manual_seed(seed)
    for name, p in layout.items():
        if name in adapters:
            yield name, adapters[name]
        elif name.endswith("lora_a"):
            bound = p.size(1) ** -0.5
            yield name, torch.empty(p.shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith("lora_b"):
            yield name, torch.zeros(p.shape)


def save_merged(path, model, pieces, folder, tokenizer_path=None, dtype=None):
    """Writes a checkpoint directory of a model with a folder's adapters added.

    model, pieces: as open_checkpoint has them. dtype: of all tensors; None: each keeps its own. Errors: see
    load_adapters.
    """
    adapters, factor = load_adapters(folder, model.args, model.state_dict())
    tensors = mapped.whole_tensors(pieces, model.args.tie_word_embeddings)
    state = dict(with_adapters(tensors, adapters, factor, dtype))
    if model.args.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    checkpoint.save_checkpoint(path, model.args, state, tokenizer_path, replace=True)


def with_adapters(tensors, adapters, factor, dtype=None):
    """Yields (name, tensor) of a base with load_adapters' adapters added, in dtype, or each in its own."""
    for name, tensor in tensors:
        if name.replace("weight", "lora_a") in adapters:
            a = adapters[name.replace("weight", "lora_a")]
            b = adapters[name.replace("weight", "lora_b")]
            yield name, (tensor.float() + factor * (b @ a)).to(dtype or tensor.dtype)
        else:
            yield name, tensor.to(dtype or tensor.dtype)
