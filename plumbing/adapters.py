"""Adapters as PEFT's files: adapter_config.json and adapter_model.safetensors, ours and others'.

Names and the order of rows are those of Hugging Face's folders, see plumbing/huggingface.py.
"""

import json
import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from plumbing import checkpoint, huggingface
from plumbing.cli import expect
from plumbing.text_files import read_json, write_json

MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
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


def save_adapters(path, args, states, tokenizer_path=None, progress=None, optimizer_dir=None, *, alpha,
                  base):
    """Writes adapters as a folder that peft reads, in which training goes on, too.

    As checkpoint.save_checkpoint; states: one dictionary, name -> lora_a or lora_b. base: the path of the
    frozen model.
    """
    state, = states
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
        write_json(part / CONFIG, config)
        huggingface.save_tensors(part / WEIGHTS, tensors, part / CONFIG)


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
        raise ValueError(f"{path}: damaged, or not from safetensors; download it again ({error})") from None
    expect(found, path, "no tensor", "adapters; download it again")
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
