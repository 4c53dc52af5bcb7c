"""transformers and llama.cpp as contestants of bench.py: functions of prompts and a number of new tokens.

They return the seconds of prefill and of decoding, which makes the tokens after the first.
"""

import importlib.util
import os
import sys
import time

import numpy as np
import torch

import llama31
from plumbing import checkpoint


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def transformers_runner(ckpt_dir, folder, dtype, device):
    """transformers' generate, with batches padded on the left, from a Hugging Face folder that it writes."""
    import transformers

    from convert import to_hf
    to_hf(ckpt_dir, folder)
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)

    def seconds(prompts, new):
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        start = time.perf_counter()
        model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new,
                       pad_token_id=0, eos_token_id=[])
        synchronize(device)
        return time.perf_counter() - start

    def run(prompts, new):
        first = seconds(prompts, 1)
        return first, seconds(prompts, new) - first if new > 1 else 0.0
    return run


GGUF_NAMES = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}


def write_gguf(path, args, pieces, kind):
    """Writes llama.cpp's file of open_checkpoint's, without a vocabulary; kind: F32, F16, BF16 or Q8_0."""
    import gguf
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    for name, value in dict(
            vocab_size=args.vocab_size, context_length=args.max_seq_len, embedding_length=args.dim,
            block_count=args.n_layers, feed_forward_length=args.hidden_dim, head_count=args.n_heads,
            head_count_kv=args.n_kv_heads, rope_freq_base=args.rope_theta, layer_norm_rms_eps=args.norm_eps,
            rope_dimension_count=args.head_dim).items():
        getattr(writer, f"add_{name}")(value)
    kinds = gguf.GGMLQuantizationType
    for name, tensor in checkpoint.checkpoint_tensors(args, pieces):
        layer, _, part = name.removesuffix(".weight").removeprefix("layers.").partition(".")
        name = {"tok_embeddings": "token_embd", "norm": "output_norm"}.get(layer, layer)
        name = f"blk.{layer}.{GGUF_NAMES[part]}.weight" if part else f"{name}.weight"
        chosen = kinds.F32 if tensor.dim() == 1 else kinds[kind]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), chosen), raw_dtype=chosen)
    if args.use_scaled_rope:
        unscaled = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
        writer.add_tensor("rope_freqs.weight", (unscaled / llama31.rope_frequencies(args)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp on a GGUF file, through llama-cpp-python's low-level interface."""

    def __init__(self, path, max_seq_len, max_batch_size):
        import llama_cpp
        self.cpp = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept, as C calls it
        llama_cpp.llama_log_set(self.log, None)
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path),
                                                          llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = max_seq_len * max_batch_size, max_batch_size
        settings.n_batch = max_seq_len * max_batch_size
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def step(self, rows, start_pos):
        """Reads tokens of every row, from its position on; the likeliest next token of each."""
        batch, last, n = self.batch, [], 0
        for i, (row, start) in enumerate(zip(rows, start_pos, strict=True)):
            for j, token in enumerate(row):
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, start + j, 1, i
                batch.logits[n] = j == len(row) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if status := self.cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [int(np.ctypeslib.as_array(self.cpp.llama_get_logits_ith(self.context, i), (self.vocab_size,))
                    .argmax()) for i in last]

    def __call__(self, prompts, new):
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        tokens, lengths = self.step(prompts, [0] * len(prompts)), list(map(len, prompts))
        read = time.perf_counter()
        for step in range(new - 1):
            tokens = self.step([[token] for token in tokens], [n + step for n in lengths])
        return read - start, time.perf_counter() - read


def missing(*names):
    """Those of the packages that are not installed, which one line tells."""
    absent = [name for name in names if not importlib.util.find_spec(name)]
    if absent:
        print(f"not installed, so not measured: {', '.join(absent)}", file=sys.stderr)
    return absent


def peers_of(ckpt_dir, folder, kind, dtype, device, room, batch_size):
    """Name -> contestant, of those that are installed."""
    absent = missing("transformers", "llama_cpp", "gguf")
    peers = {}
    if "transformers" not in absent:
        peers["transformers"] = transformers_runner(ckpt_dir, folder / "hf", dtype, device)
    if device.type == "cpu" and not {"llama_cpp", "gguf"} & set(absent):
        write_gguf(folder / "model.gguf", *llama31.open_checkpoint(ckpt_dir), kind)
        peers[f"llama.cpp, {kind}"] = LlamaCpp(folder / "model.gguf", room, batch_size)
    return peers
