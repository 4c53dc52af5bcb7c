"""Learning per minute: bits per byte of unseen real stories, beside a nanoGPT-style recipe in the same time.

    LEARNING_MINUTES=3 TINYSTORIES_SAMPLE=DIR pytest -n0 tests/test_learning.py -m slow -s

The vocabulary, the number of parameters and the training loop are the same; the models and their optimizers'
settings are not: learned positions, LayerNorm and a GELU MLP against RoPE, RMSNorm and SwiGLU.
"""

import math
import os
import statistics

import pytest
import torch
import torch.nn.functional as F
from tiny import read_log, read_weights
from torch import nn

import llama31
from llama31 import Transformer, train
from tiny_stories import text

SHAPE = dict(dim=384, n_layers=6, n_heads=6, n_kv_heads=6, multiple_of=32, tie_word_embeddings=True,
             rope_theta=10000.0)
BATCH = dict(batch_size=6, seq_len=256, shuffle=True)
# the default rate, with the demo's schedule; and of nanoGPT's small model
OURS = dict(min_lr=0.0, warmup_steps=30)
NANOGPT = dict(lr=1e-3, min_lr=1e-4, warmup_steps=100, betas=(0.9, 0.99), doc_mask=False)


class GPTBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.n_heads = args.n_heads
        self.attention_norm = nn.LayerNorm(args.dim, bias=False)
        self.wqkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.ffn_norm = nn.LayerNorm(args.dim, bias=False)
        self.up = nn.Linear(args.dim, 4 * args.dim, bias=False)
        self.w2 = nn.Linear(4 * args.dim, args.dim, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                   for t in self.wqkv(self.attention_norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(-2))
        return x + self.w2(F.gelu(self.up(self.ffn_norm(x))))


class GPT(Transformer):
    """nanoGPT's model: only what surrounds it, the loss and the loop, is the Transformer's."""

    def __init__(self, args):
        nn.Module.__init__(self)
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.positions = nn.Embedding(BATCH["seq_len"], args.dim)
        self.layers = nn.ModuleList(GPTBlock(args) for _ in range(args.n_layers))
        self.norm = nn.LayerNorm(args.dim, bias=False)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie()
        self.activation_checkpointing = False

    @torch.no_grad()
    def init_weight(self, name, p, generator=None):
        if p.dim() == 1:
            return p.fill_(1)
        shrink = math.sqrt(2 * self.args.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 1
        return p.normal_(std=0.02 / shrink, generator=generator)

    def trunk(self, tokens, positions, mask=None, cached=None):
        x = self.tok_embeddings(tokens) + self.positions(positions)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def learn(data, out_dir, minutes, **recipe):
    """(bits per byte at the end, parameters, tokens, tokens/s) of as many steps as fit into the time."""
    def run(folder, steps):
        train(train_data=str(data / "train.bin"), val_data=str(data / "val.bin"), out_dir=str(folder),
              preset="learning", tokenizer_path=str(data / "tokenizer.model"), steps=steps, eval_steps=0,
              eval_interval=10**9, save_interval=0, device="cpu", **BATCH, **recipe)
        return read_log(folder)
    speed = statistics.median(record["tokens_per_s"] for record in run(out_dir / "speed", 12)[4:])
    tokens = BATCH["batch_size"] * BATCH["seq_len"]
    steps = round(minutes * 60 * speed / tokens)
    records = run(out_dir / "run", steps)
    state = read_weights(next(out_dir.glob("run/step_*")))
    parameters = sum(tensor.numel() for name, tensor in state.items() if name != "output.weight")
    return (records[-1]["val_bpb"], parameters, steps * tokens,
            statistics.median(record["tokens_per_s"] for record in records))


@pytest.mark.slow
def test_the_llama_learns_more_in_the_same_time_than_an_equal_nanogpt(tmp_path, monkeypatch):
    sample, minutes = os.environ.get("TINYSTORIES_SAMPLE"), os.environ.get("LEARNING_MINUTES")
    if not sample or not minutes:
        pytest.skip("TINYSTORIES_SAMPLE, the folder of real stories, and LEARNING_MINUTES are not both set")
    text(input=[f"{sample}/{name}" for name in sorted(os.listdir(sample))], field="story", val_fraction=0.1,
         vocab_size=2048, data_dir=str(tmp_path))
    monkeypatch.setitem(llama31.PRESETS, "learning", SHAPE)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    try:
        ours = learn(tmp_path, tmp_path / "llama", float(minutes), **OURS)
        monkeypatch.setattr(llama31, "Transformer", GPT)
        theirs = learn(tmp_path, tmp_path / "gpt", float(minutes), **NANOGPT)
    finally:
        torch.set_num_threads(threads)
    for model, (bpb, parameters, tokens, speed) in (("Llama", ours), ("nanoGPT", theirs)):
        print(f"| {model} | {parameters:,} | {tokens:,} | {speed:,.0f} | {bpb:.3f} |")
    assert ours[1] == pytest.approx(theirs[1], rel=0.03)
    assert ours[0] < theirs[0]
