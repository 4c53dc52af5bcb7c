"""What training takes of a device.

    python bench.py memory    # GB of each GPU, computed without computing
    python bench.py doc_mask  # what it costs that documents don't see each other, measured here
"""

import dataclasses
import statistics
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cli
from llama31 import PRESETS, ChunkedCrossEntropy, ModelArgs, Transformer

# -----------------------------------------------------------------------------
# Memory of training


def saved_bytes(args, batch_size, seq_len, activation_checkpointing, dtype):
    """Bytes that a forward pass keeps for the backward pass, besides the parameters.

    dtype: of the parameters; the computation is in bfloat16. Tensors are fakes, which have a size only.
    """
    with torch.device("meta"):
        model = Transformer(args)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {name: torch.empty(p.shape, dtype=dtype) for name, p in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.tie()
        model.activation_checkpointing = activation_checkpointing
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast(
                "cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(tokens, tokens)  # noqa: F841 (it holds what is kept)
        for p in model.parameters():
            kept.pop(p.untyped_storage()._cdata, None)
        return sum(storage.nbytes() for storage in kept.values())


def training_memory(args, batch_size, seq_len, processes=1, fsdp=False, activation_checkpointing=False):
    """Bytes that each process of training takes at its peak, in bfloat16 over float32 weights.

    Weights, gradients and AdamW's averages are 16 bytes a parameter. FSDP shares them out, but gathers the
    embedding, the output and two blocks in bfloat16, and sums gradients in float32. To this comes what the
    forward pass keeps, and a chunk of logits with its softmax and gradient.
    """
    def saved(n_layers, recomputed):
        return saved_bytes(dataclasses.replace(args, n_layers=n_layers), batch_size, seq_len, recomputed,
                           torch.bfloat16 if fsdp else torch.float32)
    with torch.device("meta"):
        model = Transformer(args)
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.layers[0].parameters())
    outer = total - args.n_layers * block
    states = 16 * total
    if fsdp:
        states = 16 * total / processes + (2 + 4) * outer + (2 * 2 + 4) * block
    kept = saved(args.n_layers, activation_checkpointing)
    if activation_checkpointing:  # one block at a time is computed again
        kept += saved(2, False) - saved(1, False)
    logits = 3 * 4 * min(ChunkedCrossEntropy.LOGITS_AT_ONCE, batch_size * seq_len * args.vocab_size)
    return int(states + kept + logits)


def memory(*, batch_size: int = 1, seq_len: int = 2048):
    """Prints as a Markdown table what training takes of each GPU, in GB, and where that fits.

    batch_size, seq_len: of a micro-batch.
    """
    ways = {"one GPU, or eight with DDP": {}, "eight with --fsdp": dict(processes=8, fsdp=True)}
    print(f"| model | {batch_size} x {seq_len:,} tokens a GPU | GB | with --activation_checkpointing |")
    print("|---|---|---|---|")
    for name in ("llama3.2-1b", "llama3.1-8b", "llama3.1-70b"):
        for way, settings in ways.items():
            cells = []
            for recomputed in (False, True):
                size = training_memory(ModelArgs(**PRESETS[name]), batch_size, seq_len,
                                       activation_checkpointing=recomputed, **settings) / 1e9
                fits = [f"{room} GB" for room in (24, 80) if size < 0.95 * room]  # CUDA itself takes some
                cells.append(f"{size:,.0f}: " + (f"fits {fits[0]}" if fits else "does not fit 80 GB"))
            print(f"| {name} | {way} | {cells[0]} | {cells[1]} |")


# -----------------------------------------------------------------------------
# Document mask


def doc_mask(*, batch_size: int = 4, seq_len: int = 512, document: int = 150, rounds: int = 12):
    """Prints training's tokens/s with and without --doc_mask, in alternation, and the ratio of their times.

    document: its mean length in tokens, about a TinyStory's. The model: 6 layers of dim 576.
    """
    model = Transformer(ModelArgs(dim=576, n_layers=6, n_heads=9, n_kv_heads=3, vocab_size=2048,
                                  tie_word_embeddings=True))
    tokens = torch.randint(2047, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0))
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 1 / document] = 2047
    seconds = {2047: [], None: []}  # by the id at which documents begin
    for _ in range(rounds + 1):
        for bos_id, times in seconds.items():
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens[:, :-1], tokens[:, 1:], bos_id)
            loss.backward()
            model.zero_grad()
            times.append(time.perf_counter() - start)
    masked, causal = (times[1:] for times in seconds.values())  # the first warms up
    speeds = [batch_size * seq_len / statistics.median(times) for times in (masked, causal)]
    ratio = statistics.median(m / c for m, c in zip(masked, causal, strict=True))
    print(f"{speeds[0]:,.0f} tokens/s with the mask, {speeds[1]:,.0f} without: {ratio:.3f} times as long")


if __name__ == "__main__":
    cli.run({"memory": memory, "doc_mask": doc_mask}, default=None)
