"""transformers and llama.cpp as contestants of bench.py, with the same weights.

A contestant is a function of prompts and a number of new tokens. It returns the seconds of the prefill,
which makes the first new token, and of decoding the others.
"""

import functools
import importlib.util
import os
import sys
import time

import numpy as np
import torch

import convert
import llama31
from plumbing.gguf_file import write_gguf


def missing(*names):
    """Those of the packages that are not installed, which one line on standard error names."""
    absent = [name for name in names if not importlib.util.find_spec(name)]
    if absent:
        print(f"not installed, so not measured: {', '.join(absent)}", file=sys.stderr)
    return absent


def peers_of(ckpt_dir, folder, kind, dtype, device, room, batch_size):
    """Name -> contestant, of those that are installed.

    folder: takes the checkpoint in their formats. kind, dtype: of llama.cpp's and of transformers' weights.
    room: tokens of a row at most, new ones included.
    """
    absent = missing("transformers", "llama_cpp", "gguf")
    peers = {}
    if "transformers" not in absent:
        import transformers  # It takes seconds, and is wanted only with --peers.
        convert.to_hf(ckpt_dir, folder / "hf")
        transformers.logging.set_verbosity_error()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=dtype).to(device)
        peers["transformers"] = transformers_runner(model, device)
    if device.type == "cpu" and "llama_cpp" not in absent and "gguf" not in absent:
        model, pieces = llama31.open_checkpoint(ckpt_dir)
        write_gguf(folder / "model.gguf", model.args, pieces, kind, model.rope_frequencies)  # for ids alone
        peers[f"llama.cpp, {kind}"] = LlamaCpp(folder / "model.gguf", room, batch_size)
    return peers

# -----------------------------------------------------------------------------
# transformers


def transformers_runner(model, device):
    """transformers' generate."""
    def seconds(prompts, new):
        width = max(len(row) for row in prompts)  # generate wants padding on the left
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        start = time.perf_counter()
        made = model.generate(tokens, attention_mask=mask, do_sample=False, use_cache=True,
                              max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=[])
        made.tolist()  # This waits for a GPU.
        return time.perf_counter() - start

    def run(prompts, new):
        first = seconds(prompts, 1)
        return first, seconds(prompts, new) - first if new > 1 else 0.0

    return run

# -----------------------------------------------------------------------------
# llama.cpp


@functools.cache  # It keeps the function alive, which C calls as long as the process lives.
def silence(llama_cpp):
    """Lets llama.cpp log nothing."""
    nothing = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(nothing, None)
    return nothing


class LlamaCpp:
    """llama.cpp on a GGUF file, through llama-cpp-python's low-level interface."""

    def __init__(self, path, max_seq_len, max_batch_size):
        import llama_cpp
        self.cpp = llama_cpp
        silence(llama_cpp)
        defaults = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), defaults)
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = max_batch_size
        settings.n_ctx = settings.n_batch = max_seq_len * max_batch_size
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def step(self, rows, start_pos):
        """Reads tokens of every row, from its position on; returns the likeliest next token of each."""
        batch = self.batch
        n = 0
        last = []
        for i, (row, start) in enumerate(zip(rows, start_pos, strict=True)):
            for j, token in enumerate(row):
                batch.token[n] = token
                batch.pos[n] = start + j
                batch.seq_id[n][0] = i
                batch.n_seq_id[n] = 1
                batch.logits[n] = j == len(row) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if status := self.cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        logits = [self.cpp.llama_get_logits_ith(self.context, i) for i in last]
        return [int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax()) for row in logits]

    def __call__(self, prompts, new):
        self.cpp.llama_memory_clear(self.cpp.llama_get_memory(self.context), True)
        lengths = [len(prompt) for prompt in prompts]
        start = time.perf_counter()
        tokens = self.step(prompts, [0] * len(prompts))
        read = time.perf_counter()
        for step in range(new - 1):
            tokens = self.step([[token] for token in tokens], [n + step for n in lengths])
        return read - start, time.perf_counter() - read
