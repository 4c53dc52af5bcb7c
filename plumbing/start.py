"""How a training starts: what its flags may say, what they name, and the weights that it begins with."""

import dataclasses
import os

import torch

from plumbing import checkpoint, files, lora, parallel
from plumbing.cli import expect, expect_at_least
from plumbing.mapped import pop_pieces


def check_flags(flags):
    """Raises ValueError naming a flag of train that is out of range, or two that don't go together."""
    def named(*names):
        return {name: flags[name] for name in names}

    expect_at_least(1, **named("batch_size", "seq_len", "total_batch_tokens", "steps", "epochs",
                               "eval_interval", "keep"))
    expect_at_least(0, **named("lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "eval_steps",
                               "sample_interval", "save_interval"))
    expect(0 <= flags["seed"] < 2**63, "seed", flags["seed"], "0 to 2**63 - 1")
    betas = flags["betas"]
    expect(all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers from 0 to below 1")
    expect(flags["dtype"] in (None, "float32", "bfloat16"), "dtype", flags["dtype"],
           "float32 or bfloat16; float16 underflows")
    has_whole_matrices = not flags["fsdp"] and not flags["lora_rank"] and flags["param_dtype"] == "float32"
    expect(has_whole_matrices or not flags["muon"], "muon", flags["muon"],
           "no --fsdp, --lora_rank or --param_dtype beside it, as it wants whole matrices in float32")


def check_source(source, ckpt_dir, preset, tokenizer_path, presets):
    """Raises ValueError if flags don't say, or say twice, what a training begins with.

    source: the checkpoint that it resumes or finetunes; None: neither.
    """
    if ckpt_dir is not None and preset is not None:
        raise ValueError("found --ckpt_dir and --preset; expected one of them")
    if source is None and (preset is None or tokenizer_path is None):
        raise ValueError("found neither --ckpt_dir, to finetune, nor both --preset and --tokenizer_path, to "
                         "train from scratch")
    expect(preset in (None, *presets), "preset", preset, f"one of {', '.join(presets)}")


def check_shape(newest, found, asked):
    """Raises ValueError if a run's checkpoint has another shape, a dataclass, than the flags ask for."""
    for field in dataclasses.fields(found):
        has = getattr(found, field.name)
        wanted = getattr(asked, field.name)
        if has != wanted and field.name not in ("max_seq_len", "tie_word_embeddings"):
            raise ValueError(f"{newest} has {field.name} {has}, but {wanted} is asked for; resume without "
                             "--preset and --ckpt_dir, or give another --out_dir")


def default_lr(dim, is_new, has_adapters):
    """A rate to begin with: the wider a model, the lower. docs/measurements.md has the runs behind it."""
    if is_new:
        return 0.6 / dim
    return (0.5 if has_adapters else 0.05) / dim


def validation_pattern(train_pattern, val_pattern):
    """(pattern of the shards to validate on, a line on them): one that is given, or with val for train.

    The pattern is None where none is given, and no file is named so.
    """
    if val_pattern is not None:
        return val_pattern, ""
    folder, name = os.path.split(train_pattern)
    pattern = os.path.join(folder, name.replace("train", "val"))
    if pattern == train_pattern:
        return None, f"no validation: --val_data is not given, and no train in {name} could become val"
    if not files.matching(pattern):
        return None, f"no validation: --val_data is not given, and no file matches {pattern}"
    return pattern, ""


def fill_model(model, pieces, seed, device, dtype, fsdp, adapters=None):
    """Gives a model on the meta device its weights: a checkpoint's pieces, or drawn with a seed.

    They have the types that the model's parameters have on that device. fsdp: as shards, which are gathered
    in dtype, see train. adapters: a folder with those of an adapted model; None: drawn.
    """
    # Of what is trained there is a weight, a gradient and two averages.
    num_bytes = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    sharing = parallel.ranks_that_share(fsdp)
    parallel.check_memory_of_ranks("weights, gradients and AdamW's averages", num_bytes, device, sharing)
    if fsdp:
        parallel.shard_parameters(model, device, dtype, sharing)
    if pieces:
        tensors = pop_pieces(pieces, model.args.tie_word_embeddings)
        if lora.is_adapted(model):
            tensors = lora.adapted_tensors(model, tensors, seed, adapters)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        tensors = ((name, model.init_weight(name, torch.empty(p.shape, device=device), generator))
                   for name, p in model.named_parameters())
    checkpoint.load_weights(model, tensors, device)
