"""Devices: the types of numbers in which they multiply, how fast, and how much training multiplies."""

import time

import torch

from plumbing.cli import expect


def choose_device(device=None):
    """The torch.device asked for; None: cuda, else mps, else cpu. ValueError where it is not there."""
    if device is None and torch.cuda.is_available():
        device = "cuda"
    elif device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device} can't be used: {str(error).splitlines()[0]}") from None
    return torch.device(device)


def choose_dtype(dtype):
    """The torch.dtype of a name such as "bfloat16"; a dtype or None as it is."""
    if dtype is None:
        return None
    name = name_of(dtype)
    expect(name in ("float32", "bfloat16", "float16"), "dtype", name, "float32, bfloat16 or float16")
    return getattr(torch, name)


def name_of(dtype):
    """The name of a torch.dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def fast_dtype(device, stored=None):
    """The type in which a device multiplies fast enough and exactly enough.

    stored: the type of weights that are only to be read; None: training. On the CPU those are never rounded:
    bfloat16 is for weights that are bfloat16. On a GPU before compute capability 8.0 it is float16, but not
    in training, where the smallest gradients would be 0.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float32 if stored is None else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if stored is None else stored
    # Without AVX512-BF16 or AMX, a product in bfloat16 takes seven times as long as in float32, and twice as
    # long on Intel's processors without AMX, which still gain by reading less when they sample. torch may be
    # set to use less than the processor has.
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has = torch.cpu.get_capabilities().get
    is_slow_intel = stored is None and not has("amx_bf16") and has("cpu_name", "").startswith("Intel")
    is_fast = has_avx512 and (has("amx_bf16") or has("avx512_bf16")) and not is_slow_intel
    if is_fast and stored in (None, torch.bfloat16):
        return torch.bfloat16
    return torch.promote_types(torch.float32, stored or torch.float32)


def measured_peak(device, dtype):
    """FLOP/s of large matrix products on a device: what model FLOPs utilization (MFU) is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # This waits for the result.
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)  # n x n results of n multiplications and n additions each


def flops_per_token(model, seq_len):
    """FLOPs of training a model on one token: 6 per weight, plus those of causal attention.

    2 are the forward pass and 4 the backward pass. A frozen weight takes 4, as the backward pass only goes
    through it. The embedding takes none, as its rows are looked up.
    """
    args = model.args
    flops = sum((6 if p.requires_grad else 4) * p.numel()
                for part in (model.layers, model.norm, model.output)
                for name, p in part.named_parameters() if not name.endswith("scale"))
    return flops + 6 * args.n_layers * seq_len * args.n_heads * args.head_dim
