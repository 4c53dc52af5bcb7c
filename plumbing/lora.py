"""Finetuning in little memory: low-rank adapters on a frozen base, in and out as PEFT's files.

W x becomes W x + (alpha / rank) B A x with a frozen W (out, in), a trained A (rank, in) and B (out, rank),
as in LoRA (Hu et al., 2021); W may be int8, as in QLoRA (Dettmers et al., 2023). Only the names of tensors
are known here: a model is a value with layers.
"""

import functools
import json
import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from plumbing import checkpoint, huggingface
from plumbing.cli import expect, expect_at_least
from plumbing.fast import GROUP, dequantize, name_of, product_dtype, quantize, widen
from plumbing.files import read_json

MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

# -----------------------------------------------------------------------------
# The product


class AdaptedProduct(torch.autograd.Function):
    """x (..., in) times a frozen weight (out, in) and the adapter on it -> (..., out).

    The weight is of any stored type, int8 with its scales; it is widened to dtype for the product, and again
    for that of the backward pass, so that no widened copy is kept. It gets no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, a, b, factor, dtype):
        ctx.save_for_backward(x, weight, scale, a, b)
        ctx.factor = factor
        ctx.dtype = dtype
        rows = x.flatten(0, -2).to(dtype)
        y = rows @ widened(weight, scale, dtype).T
        y.addmm_(rows @ a.T.to(dtype), b.T.to(dtype), alpha=factor)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, a, b = ctx.saved_tensors
        dtype = ctx.dtype
        grad = grad.flatten(0, -2).to(dtype)
        rows = x.flatten(0, -2).to(dtype)
        grad_low = grad @ b.to(dtype) * ctx.factor  # (N, rank), of what A makes of x
        grad_b = grad.T @ (rows @ a.T.to(dtype)) * ctx.factor
        grad_x = None
        if ctx.needs_input_grad[0]:  # Below the first layer nothing learns.
            grad_x = grad @ widened(weight, scale, dtype)
            grad_x.addmm_(grad_low, a.to(dtype))
            grad_x = grad_x.view_as(x).type_as(x)
        return grad_x, None, None, (grad_low.T @ rows).type_as(a), grad_b.type_as(b), None, None


def widened(weight, scale, dtype):
    """A stored matrix in dtype; scale: of int8, else None."""
    values = weight if scale is None else dequantize(weight, scale)
    return values.to(dtype)


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
        return AdaptedProduct.apply(x, self.weight, self.scale, self.lora_a, self.lora_b, self.factor,
                                    product_dtype(x))


def check_flags(rank, alpha, quantize, base):
    """Raises ValueError where train's flags of adapters don't fit together; base: --ckpt_dir."""
    expect_at_least(0, lora_rank=rank)
    expect(quantize in (None, "int8"), "quantize", repr(quantize), "int8 or None")
    expect(alpha is None or 0 < alpha < math.inf, "lora_alpha", alpha, "a number above 0")
    expect(rank > 0 or quantize is None, "quantize", quantize,
           "--lora_rank, too: only a frozen model's weights can be int8")
    expect(rank > 0 or alpha is None, "lora_alpha", alpha, "--lora_rank, too")
    expect(rank == 0 or base, "lora_rank", rank, "--ckpt_dir, too: adapters are put on a finished model")


def base_files(ckpt_dir):
    """The files of weights of a checkpoint directory, Meta's or Hugging Face's."""
    layout = huggingface if huggingface.holds_weights(ckpt_dir) else checkpoint
    return layout.weight_files(Path(ckpt_dir))


def adapt(model, rank, alpha, stored, quantize, base):
    """Freezes a model on the meta device in its stored type, and puts adapters on its layers' matrices.

    rank 0: leaves it as it is. alpha None: twice the rank. quantize: "int8", for those matrices, or None;
    embedding and output keep that type. base: path of the model. Returns what saves as save_checkpoint does
    what is trained, its type, and a line on what was done.
    """
    if rank == 0:
        return checkpoint.save_checkpoint, stored, ""
    alpha = alpha or 2 * rank
    count = sum(p.numel() for p in model.parameters())
    model.to(stored).requires_grad_(False)
    with torch.device("meta"):
        for layer in model.layers:
            for name in MATRICES:
                weight = layer.get_submodule(name).weight
                layer.set_submodule(name, AdaptedLinear(weight, rank, alpha, quantize))
    widen(model, torch.float32)  # of what is left, embedding and output
    kinds = name_of(stored) + (", matrices of layers in int8" if quantize else "")
    save = functools.partial(save_adapters, alpha=alpha, base=os.path.abspath(base))
    return save, torch.float32, f"adapters of rank {rank} on {count:,} frozen parameters in {kinds}"


def is_adapted(model):
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


def adapted_tensors(model, tensors, seed, newest=None):
    """Yields (name, tensor) of an adapted model: its base's tensors, quantized where it is, and adapters.

    newest: a folder of adapters to go on with; None: A is drawn as PEFT does, on all ranks alike, B is zero.
    """
    layout = model.state_dict()
    adapters, _ = load_adapters(newest, model.args, layout) if newest else ({}, None)
    for name, tensor in tensors:
        if layout[name].dtype == torch.int8:
            tensor, scale = quantize(tensor)
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


def save_merged(path, model, tensors, folder, tokenizer_path):
    """Writes a checkpoint directory of a base's (name, tensor) pairs with a folder's adapters added."""
    adapters, factor = load_adapters(folder, model.args, model.state_dict())
    state = dict(with_adapters(tensors, adapters, factor))
    if model.args.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    checkpoint.save_checkpoint(path, model.args, state, tokenizer_path, replace=True)


def with_adapters(tensors, adapters, factor):
    """Yields (name, tensor) of a base with load_adapters' adapters added, each in its own type."""
    for name, tensor in tensors:
        if name.replace("weight", "lora_a") in adapters:
            a = adapters[name.replace("weight", "lora_a")]
            b = adapters[name.replace("weight", "lora_b")]
            tensor = (tensor.float() + factor * (b @ a)).to(tensor.dtype)
        yield name, tensor

# -----------------------------------------------------------------------------
# PEFT's files

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ALLOWED = {  # field of adapter_config.json -> what it may be, first what it is where it is absent
    "peft_type": (None, "LORA"), "bias": ("none",), "lora_bias": (False, None), "use_dora": (False, None),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "fan_in_fan_out": (False, None),
    "modules_to_save": ([], None), "trainable_token_indices": ([], None), "layer_replication": ([], None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # Others change the base.
}


def peft_names(args):
    """Our name of every adapter's matrix -> PEFT's."""
    names = {}
    for name, theirs in huggingface.tensor_names(args).items():
        matrix = name.removesuffix(".weight")
        if matrix.endswith(MATRICES):
            stem = PREFIX + theirs.removesuffix("weight")
            names[f"{matrix}.lora_a"] = f"{stem}lora_A.weight"
            names[f"{matrix}.lora_b"] = f"{stem}lora_B.weight"
    return names


def save_adapters(path, args, state, tokenizer_path=None, progress=None, optimizer_dir=None, *, alpha, base):
    """Writes adapters as a folder that peft reads, in which training goes on, too.

    As checkpoint.save_checkpoint; state: name -> lora_a or lora_b. base: the path of the frozen model.
    """
    names = peft_names(args)
    rank = state["layers.0.attention.wq.lora_a"].size(0)
    modules = sorted({name.split(".")[-3] for name in names.values()})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
              "lora_alpha": alpha, "target_modules": modules, "lora_dropout": 0.0, "bias": "none",
              "inference_mode": True}
    # B's rows are those of its matrix, and so in Hugging Face's order there.
    tensors = {names[name]: huggingface.reordered(name, tensor, args, to_meta=False).contiguous()
               if name.endswith("lora_b") else tensor for name, tensor in state.items()}
    with checkpoint.checkpoint_folder(path, tokenizer_path, progress, optimizer_dir) as part:
        huggingface.write_json(part / CONFIG, config)
        try:
            save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # The disk may be full.
            raise OSError(f"{path}: {error}") from None


def load_adapters(folder, args, layout):
    """(name -> lora_a or lora_b, in float32; the factor of their products) of PEFT's files, ours or others'.

    layout: name -> tensor of the base's shapes. FileNotFoundError or ValueError names what is absent,
    damaged, doesn't fit or is of a kind that we don't have.
    """
    path = Path(folder, CONFIG)
    config = read_json(path)
    for name, allowed in ALLOWED.items():
        found = config.get(name, allowed[0])
        expect(found in allowed, f"{path}: {name}", json.dumps(found),
               f"{json.dumps(allowed[0])}, as such adapters can be added to a model by peft alone")
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    expect(type(rank) is int and rank > 0, f"{path}: r", json.dumps(rank), "a whole number of at least 1")
    expect(isinstance(alpha, int | float), f"{path}: lora_alpha", json.dumps(alpha), "a number")
    path = path.with_name(WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; an adapter's folder holds it beside {CONFIG}")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, or not from safetensors; get it again ({error})") from None
    expect(found, path, "no tensor", "adapters; get it again")
    names = peft_names(args)
    adapted = {theirs.rpartition(".lora_")[0] for theirs in found}  # Theirs need not be on all matrices.
    names = {name: theirs for name, theirs in names.items() if theirs.rpartition(".lora_")[0] in adapted}
    shapes = {}
    for name, theirs in names.items():
        size_out, size_in = layout[name.rpartition(".")[0] + ".weight"].shape
        shapes[theirs] = [rank, size_in] if name.endswith("lora_a") else [size_out, rank]
    checkpoint.check_tensors(path, found, shapes)
    adapters = {}
    for name, theirs in names.items():
        tensor = found[theirs].float()
        is_b = name.endswith("lora_b")
        adapters[name] = huggingface.reordered(name, tensor, args, to_meta=True) if is_b else tensor
    return adapters, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
