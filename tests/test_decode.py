"""Compiled inference and int8 weights: the same numbers, compiled once, Meta's keys, half the memory."""

import copy
import math
import mmap
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import assert_close, output, random_llama, random_model, write_checkpoint
from torch._dynamo.utils import counters

from llama31 import Llama, ModelArgs, Transformer, load_checkpoint
from plumbing import fast
from plumbing.compiler import FLAGS
from plumbing.fast import compile_inference, compile_kernels
from plumbing.narrow import Int8Linear, dequantize, load_int8, quantize, widen

HEADS_OF_8 = dict(dim=48, n_heads=6)  # as wide as a register of many processors
BATCHES = {"one token": [[5]], "one row": [[5, 6, 7]], "few rows": [[5, 6, 7], [1], [8, 9]],
           "many rows": [[i + 1] * (i % 4 + 1) for i in range(9)],
           "rows of the same length": [[i + 1] * 9 for i in range(10)]}


# Compiled int8 products round activations to 16 bits, by up to 1.5e-5 of the largest of 64. In 13 products,
# one after the other, random models make up to seven times of it; plain arithmetic is held to 1e-5.
INT8_CLOSENESS = 3e-4


def assert_compiled_close(compiled, eager, llama):
    """Asserts the contract between implementations, with more tolerance where the llama has int8 weights."""
    closeness = INT8_CLOSENESS if isinstance(llama.model.output, Int8Linear) else 1e-5
    error, size = (compiled - eager).abs().max().item(), eager.abs().max().item()
    assert error <= closeness * size, f"off by {error}, of {size}"


def greedy(llama, prompts, n=40):
    """The logits of every step, and the tokens."""
    steps = list(llama.steps(prompts, n, temperature=0))
    return torch.stack([logits for logits, _ in steps]), [newest for _, newest in steps]


@torch.inference_mode()
def forced(llama, prompts):
    """The logits of ragged prompts and of two tokens after them, which are the same whatever the logits."""
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts])
    caches = llama.new_caches(len(prompts), max(lengths) + 2)
    last = [n - 1 for n in lengths]
    logits = [llama.model.forward_cached(padded, [0] * len(prompts), caches, last, llama.reader)]
    for token in (5, 6):
        start_pos, lengths = lengths, [n + 1 for n in lengths]
        tokens = torch.full((len(prompts), 1), token)
        last = [0] * len(prompts)
        logits.append(llama.model.forward_cached(tokens, start_pos, caches, last, llama.reader))
    return torch.stack(logits)


@pytest.fixture(scope="module", params=[None, pytest.param("int8", marks=pytest.mark.slow)])
def llamas(request, tmp_path_factory):
    """The same model twice, of which the second is compiled."""
    ckpt_dir = write_checkpoint(tmp_path_factory.mktemp("decode"), random_model(**HEADS_OF_8))
    eager, compiled = (Llama(load_checkpoint(ckpt_dir, quantize=request.param), None) for _ in range(2))
    compiled.reader = compile_inference(compiled.model)
    return eager, compiled


@pytest.mark.parametrize("batch", [  # batches of several rows have kernels of their own
    "one token", "one row", *(pytest.param(name, marks=pytest.mark.slow) for name in [*BATCHES][2:])])
def test_compiled_decoding_has_the_logits_and_tokens_of_eager_decoding(llamas, batch):
    (eager, tokens), (compiled, same) = (greedy(llama, BATCHES[batch]) for llama in llamas)
    assert same == tokens
    assert_compiled_close(compiled, eager, llamas[1])


SHAPES = {"a head of keys for each of queries": dict(dim=64, n_heads=4, n_kv_heads=4, multiple_of=32),
          "one head of keys": dict(dim=64, n_heads=4, n_kv_heads=1, multiple_of=32),
          "sizes that few powers of two divide": dict(dim=60, n_heads=6, n_kv_heads=3, multiple_of=6),
          "odd hidden size": dict(dim=36, n_heads=2, n_kv_heads=1, multiple_of=7),
          "more rows and inputs than a block": dict(dim=416, n_heads=26, n_kv_heads=2, multiple_of=30),
          "heads of 128": dict(dim=256, n_heads=2, n_kv_heads=1, multiple_of=64),
          "heads narrower than a share of dim": dict(dim=96, n_heads=4, n_kv_heads=2, head_dim=10),
          "heads wider than a share of dim": dict(dim=40, n_heads=6, n_kv_heads=2, head_dim=32)}
HALVES = (torch.bfloat16, torch.float16)


def in_types(model, dtype, compute_dtype):
    """The model with its weights in a type, or "int8", and everything else in another."""
    if dtype == "int8":
        quantized = Transformer.on_meta(model.args)
        load_int8(quantized, model.state_dict().items(), "cpu", compute_dtype)
        return quantized.eval()
    model = copy.deepcopy(model).to(dtype)
    if compute_dtype != dtype:
        widen(model, compute_dtype)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("shape, dtype, compute_dtype", [
    *((shape, torch.float32, torch.float32) for shape in SHAPES),
    *((shape, "int8", torch.float32) for shape in SHAPES),
    *(("heads of 128", dtype, dtype) for dtype in HALVES),
    *(("heads of 128", dtype, torch.float32) for dtype in HALVES),
    ("sizes that few powers of two divide", torch.bfloat16, torch.float32),
    *((shape, torch.bfloat16, torch.bfloat16) for shape in [*SHAPES][-2:]),
    *((shape, torch.bfloat16, torch.float32) for shape in [*SHAPES][-2:]),
    *(("odd hidden size", "int8", dtype) for dtype in HALVES)])
def test_models_of_any_shape_and_type_have_eager_logits_compiled(shape, dtype, compute_dtype):
    """In half precision: logits as near to those of float32 as eager ones."""
    source = Transformer(ModelArgs(**SHAPES[shape], n_layers=2, vocab_size=97, norm_eps=1e-3))
    source.init_weights(torch.Generator().manual_seed(0))
    eager, compiled = (Llama(in_types(source, dtype, compute_dtype), None) for _ in range(2))
    compiled.reader = compile_inference(compiled.model)
    rounded = Llama(in_types(source, dtype, torch.float32), None)
    prompts = [[(7 * i * i + b) % 97 for i in range(n)] for b, n in enumerate((1, 8, 9, 70, 130))]
    for batch in ([prompts[0]], [prompts[4]], 3 * prompts):
        expected = forced(rounded, batch)
        errors = (forced(compiled, batch) - expected).abs()
        if compute_dtype is torch.float32:
            assert errors.max() <= (INT8_CLOSENESS if dtype == "int8" else 1e-5) * expected.abs().max()
        else:
            theirs = (forced(eager, batch) - expected).abs()
            assert errors.max() <= 1.3 * theirs.max() and errors.mean() <= 1.1 * theirs.mean()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, "int8"])
def test_any_number_of_rows_and_threads_has_the_same_logits(dtype):
    """A row beside others has its own logits, be it multiplied with few or with many."""
    llama = Llama(in_types(random_model(dim=96, n_heads=3, n_kv_heads=1), dtype, torch.float32), None)
    expected = forced(llama, [[row, 2, row + 3] for row in range(1, 20)])
    llama.reader = compile_inference(llama.model)
    threads = torch.get_num_threads()
    try:
        for number in {1, 2, threads}:
            torch.set_num_threads(number)
            for B in (1, 2, 3, 4, 5, 7, 8, 9, 17, 19):
                logits = forced(llama, [[row, 2, row + 3] for row in range(1, B + 1)])
                assert_compiled_close(logits, expected[:, :B], llama)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [48, 64, 200])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_int8_products_are_off_by_at_most_half_a_step_of_16_bits(dim, rows):
    """Plain Python's products; the extremes of int8 and of activations, in one sum, don't overflow."""
    model = in_types(random_model(dim=dim, n_heads=2, n_kv_heads=1), "int8", torch.float32)
    reader = compile_inference(model)
    weights = model.output
    weights.quantized[0] = 127
    weights.quantized[1, ::2] = -127
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-4, 4, dim)
    x[0] = 3e4
    logits = reader.head(x)
    for row, made in zip(x.tolist(), logits.tolist(), strict=True):
        matrix = zip(weights.quantized.tolist(), weights.scale.tolist(), made, strict=True)
        for values, scales, logit in matrix:
            exact = bound = 0.0
            for group, scale in enumerate(scales):
                part = slice(64 * group, 64 * group + 64)
                half_step = max(map(abs, row[part])) / 32767 / 2
                exact += scale * sum(w * a for w, a in zip(values[part], row[part], strict=True))
                bound += scale * sum(map(abs, values[part])) * half_step
            assert abs(logit - exact) <= 1.001 * bound + 1e-6 * abs(exact)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_int8_products_of_what_is_not_finite_are_not_finite(wrong):
    model = in_types(random_model(), "int8", torch.float32)
    reader = compile_inference(model)
    for rows in (1, 12):
        x = torch.ones(rows, model.args.dim)
        x[-1, 5] = wrong
        logits = reader.head(x)
        assert not logits[-1].isfinite().any() and logits[:-1].isfinite().all()


COMPILERS = {"g++": ("x86-64-v3", "alderlake", "cascadelake", "sapphirerapids"),
             "clang++": ("x86-64-v3", "sapphirerapids"), "aarch64-linux-gnu-g++": ("armv8-a",)}


@pytest.mark.slow
@pytest.mark.parametrize("compiler, arch", [(name, arch) for name in COMPILERS for arch in COMPILERS[name]])
def test_every_compiler_takes_every_pair_of_types_without_a_warning(compiler, arch):
    """AVX2, with AVX-VNNI; AVX512, with VNNI, with BF16 too; 64-bit ARM."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    if "aarch64" not in compiler and platform.machine() != "x86_64":
        pytest.skip("another processor than x86-64")
    if subprocess.run([compiler, "-fopenmp", "-fsyntax-only", "-x", "c++", "-"], input="#include <omp.h>",
                      text=True, capture_output=True).returncode:
        pytest.skip(f"{compiler}'s OpenMP is not installed")
    folder = Path(fast.__file__).parent
    command = [compiler, *FLAGS, "-O1", f"-march={arch}", "-Wall", "-Wextra", "-Werror"]
    command.remove("-march=native")
    sources = [("attention.cpp",)]
    for value, weight in (("float", "bfloat16"), ("float", "int8_t"), ("float16", "float16"),
                          ("bfloat16", "bfloat16")):
        sources.append(("fast.cpp", f"-DVALUE={value}", f"-DWEIGHT={weight}"))
    for name, *constants in sources:
        done = subprocess.run([*command, *constants, "-c", folder / name, "-o", os.devnull],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_nothing_is_compiled_anew_while_positions_grow_and_prompts_change(llamas):
    _, llama = llamas

    def compilations():
        return compile_kernels.cache_info().misses
    for rows in (1, 3, 9):
        llama.generate([[1, 2]] * rows, 3)
        compiled = compilations()
        for prompt, n in (([7], 2), ([1] * 30, 33), ([4, 5, 6], 60)):
            llama.generate([prompt] * rows, n, stop_tokens=[])
        assert compilations() == compiled


@pytest.mark.slow
@torch.inference_mode()
def test_a_compiled_prompt_is_the_same_read_in_chunks(llamas):
    llama = llamas[1]
    tokens = torch.tensor([list(range(50, 89)), [3] * 39, list(range(9, 48))])
    whole, chunked = (
        llama.model.forward_cached(tokens, [0] * 3, llama.new_caches(3), [38] * 3, llama.reader, at_once)
        for at_once in (4096, 19 * 3))
    assert_compiled_close(chunked, whole, llama)


@pytest.mark.slow
def test_a_long_prompt_in_half_precision_is_as_near_compiled_as_eagerly(tmp_path):
    """As near to the logits of float32."""
    whole = random_llama(**HEADS_OF_8, max_seq_len=5000)
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", whole.model)
    eager, compiled = (Llama(load_checkpoint(ckpt_dir, dtype=torch.bfloat16), None) for _ in range(2))
    compiled.reader = compile_inference(compiled.model)
    prompt = [i % 97 for i in range(4800)]
    expected, logits = (greedy(llama, [prompt], 1)[0] for llama in (eager, compiled))
    exact = greedy(whole, [prompt], 1)[0]
    assert (logits - exact).abs().max() <= 1.3 * (expected - exact).abs().max()


@pytest.mark.slow
def test_keys_and_values_fill_all_of_the_caches_room_and_nothing_else(llamas):
    _, llama = llamas
    with torch.inference_mode():
        caches = llama.new_caches(2, 4)
        llama.model.forward_cached(torch.tensor([[1, 2, 3], [4, 5, 0]]), [0, 0], caches, [2, 1],
                                   llama.reader)
        before = [cache.k[1, 3].clone() for cache in caches]
        logits = llama.model.forward_cached(torch.tensor([[4], [6]]), [3, 2], caches, [0, 0],
                                            llama.reader)
        full = llama.model(torch.tensor([[1, 2, 3, 4], [4, 5, 6, 0]]))[[0, 1], [3, 2]]
    assert_compiled_close(logits, full, llama)
    assert all(torch.equal(cache.k[1, 3], k) for cache, k in zip(caches, before, strict=True))


@pytest.mark.slow
@torch.inference_mode()
def test_logits_are_those_of_any_rows_of_hidden_states(llamas):
    eager, compiled = llamas
    x = torch.randn(3, 5, eager.model.args.dim, generator=torch.Generator().manual_seed(0))[:, -1]
    assert_compiled_close(compiled.reader.head(x), eager.model.head(x), compiled)


@pytest.mark.slow
def test_gates_that_are_far_below_zero_are_shut():
    eager, compiled = random_llama(), random_llama()
    for llama in (eager, compiled):
        for layer in llama.model.layers:
            layer.feed_forward.w1.weight.data *= 300
    compiled.reader = compile_inference(compiled.model)
    for prompts in ([[5]], [[5, 6, 7]]):
        assert_close(forced(compiled, prompts), forced(eager, prompts))


@pytest.mark.slow
def test_weights_that_are_not_finite_are_noticed(tmp_path):
    model = random_model()
    reader = compile_inference(model)
    with torch.no_grad():
        model.layers[1].feed_forward.w2.weight[5, 5] = math.nan
    for prompt in ([3], [3, 4]):
        with pytest.raises(ValueError, match="not all finite"):
            Llama(model, None, reader=reader).generate([prompt], 2)


@pytest.mark.slow
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_elsewhere_blocks_are_compiled_once_for_all_layers_and_prompts(monkeypatch):
    """Elsewhere than on the CPU, which is where the compiled blocks run here all the same."""
    monkeypatch.setattr(fast, "can_compile", lambda device: True)
    eager, compiled = random_llama(), random_llama()
    device = torch.device("cuda")
    compile_inference(SimpleNamespace(layers=compiled.model.layers, tensor_parallel=1, device=device))
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5], [8, 9]]
    greedy(compiled, prompts, 9)
    graphs = counters["stats"]["unique_graphs"]
    for batch in (prompts, [[1] * 5, [3], [2, 4]], [[1] * 40, [7] * 30, [9] * 20]):
        (expected, tokens), (logits, same) = greedy(eager, batch, 20), greedy(compiled, batch, 20)
        assert same == tokens
        assert_close(logits, expected)
    assert counters["stats"]["unique_graphs"] == graphs > 0 and not counters["graph_break"]


def memory_flags(address):
    """The kernel's flags of the memory at an address of this process, such as hg for huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):  # 7f01-7f02 rw-p …, and below it its VmFlags: rd wr …
            begin, end = (int(number, 16) for number in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line.split()[1:]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize", [None, pytest.param("int8", marks=pytest.mark.slow)])
def test_what_is_compiled_has_its_weights_in_huge_pages_and_unchanged(tied, quantize, tmp_path):
    source = random_model(**HEADS_OF_8, tie_word_embeddings=tied)
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", source)
    before, model = (load_checkpoint(ckpt_dir, quantize=quantize) for _ in range(2))
    compile_inference(model)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in before.state_dict().items())
    tensors = [*model.parameters(), *model.buffers()]
    assert all("hg" in memory_flags(tensor.data_ptr()) for tensor in tensors)
    matrices = (m.quantized if quantize else m.weight for m in (model.tok_embeddings, model.output))
    assert len({matrix.data_ptr() for matrix in matrices}) == (1 if tied else 2)


def test_without_a_compiler_one_line_says_so_and_decoding_goes_on(tmp_path, monkeypatch, capsys):
    expected = random_llama()
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", expected.model)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    llama = Llama.build(ckpt_dir, device="cpu", compile=True)
    assert llama.reader is None
    assert capsys.readouterr().err == "no C++ compiler found (g++, or CXX); nothing is compiled\n"
    assert llama.generate([[1, 2]], 9, temperature=0) == expected.generate([[1, 2]], 9, temperature=0)


def test_a_compiler_that_fails_is_named_in_one_line_and_decoding_goes_on(tmp_path, monkeypatch, capsys):
    expected = random_llama()
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", expected.model)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: error: unrecognized option' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    compile_kernels.cache_clear()
    llama = Llama.build(ckpt_dir, device="cpu", compile=True)
    assert capsys.readouterr().err == (f"{compiler} can't compile fast.cpp: c++: error: unrecognized "
                                       "option; nothing is compiled\n")
    assert llama.generate([[1, 2]], 9, temperature=0) == expected.generate([[1, 2]], 9, temperature=0)


def test_for_float64_one_line_says_that_nothing_is_compiled(tmp_path, capsys):
    source = random_model().double()
    compiled = Llama.build(write_checkpoint(tmp_path / "ckpt", source), device="cpu", compile=True)
    assert capsys.readouterr().err == ("no kernels for float64, take --dtype float32; nothing is compiled\n")
    expected = Llama(source, None).generate([[1, 2]], 9, temperature=0)
    assert compiled.generate([[1, 2]], 9, temperature=0) == expected


@pytest.mark.slow
def test_weights_need_not_lie_row_by_row_nor_huge_pages_exist(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    eager, compiled = random_llama(), random_llama()
    wv = compiled.model.layers[1].attention.wv
    wv.weight = torch.nn.Parameter(wv.weight.detach().T.contiguous().T)
    compiled.reader = compile_inference(compiled.model)
    assert_close(forced(compiled, [[5, 6]]), forced(eager, [[5, 6]]))


@pytest.mark.slow
def test_the_sample_command_compiles_and_quantizes(tokenizer, tmp_path):
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", random_llama(tokenizer).model, tokenizer=tokenizer)
    text = Llama.build(ckpt_dir, device="cpu", quantize="int8").text_completion(
        ["a cat"], 12, temperature=0, echo=True)[0]["generation"]
    printed = output("llama31.py", "--ckpt_dir", ckpt_dir, "--prompt", "a cat", "--device", "cpu",
                     "--max_gen_len", "12", "--temperature", "0", "--compile", "--quantize", "int8")
    assert printed == text + "\n"


@pytest.mark.parametrize("shape", [(5, 128), (3, 48), (7, 7), (1, 1), (64, 200)])
def test_every_int8_weight_is_within_half_a_step_of_its_own(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight *= 10 ** torch.linspace(-9, 3, len(weight))[:, None]
    weight[-1] = 0
    linear = Int8Linear(*quantize(weight), torch.float32)
    for values, group in zip(linear.weight.split(64, 1), weight.split(64, 1), strict=True):
        step = group.abs().amax(1, keepdim=True) / 127
        assert ((values - group).abs() <= step * (0.5 + 1e-4)).all()
    assert linear.quantized.dtype is torch.int8 and linear.quantized.abs().max() <= 127


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_model_computes_with_the_weights_of_its_state_dict(tied, dtype, tmp_path):
    source = random_model(**HEADS_OF_8, tie_word_embeddings=tied)
    model = load_checkpoint(write_checkpoint(tmp_path / "ckpt", source), dtype=dtype, quantize="int8")
    state = model.state_dict()
    assert {n: p.shape for n, p in state.items()} == {n: p.shape for n, p in source.state_dict().items()}
    assert all(p.dtype is dtype for p in state.values())
    whole = Transformer(model.args).to(dtype)
    whole.load_state_dict(state)
    tokens = torch.arange(24).view(2, 12)
    expected = whole(tokens)
    assert_close(model(tokens), expected)
    loss, its = (m.forward_loss(tokens[:, :-1], tokens[:, 1:]) for m in (whole, model))
    assert float(its) == pytest.approx(float(loss), rel=1e-5)
    exact = source(tokens)
    assert (expected - exact).abs().max() <= 0.1 * exact.abs().max()


def test_int8_takes_about_half_of_bfloat16s_memory_and_keeps_no_file_open(tmp_path):
    args = ModelArgs(dim=128, n_layers=2, n_heads=2, vocab_size=997, multiple_of=64)
    source = Transformer(args).bfloat16()
    model = load_checkpoint(write_checkpoint(tmp_path / "ckpt", source), quantize="int8")
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sum(t.nbytes for t in tensors) < 0.55 * 2 * sum(p.numel() for p in source.parameters())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)  # none is a slice of the file


def test_another_quantization_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quantize is 'int4'; expected int8"):
        Llama.build(write_checkpoint(tmp_path / "ckpt", random_model()), device="cpu", quantize="int4")


@pytest.mark.weights
def test_int8_has_bfloat16s_perplexity_of_real_text_within_half_a_percent(smollm2_dir, real_windows):
    inputs, targets = real_windows[:, :-1], real_windows[:, 1:]
    with torch.inference_mode():
        ours, expected = (math.exp(load_checkpoint(smollm2_dir, quantize=quantize)(inputs, targets))
                          for quantize in ("int8", None))
    assert ours == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("shape", [(1, 1, 70), (1, 70), (3, 1, 70), (2, 5, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_for_torch_compile_have_the_values_of_the_cpus(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = Int8Linear(*quantize(torch.randn(50, 70, generator=generator)), dtype)
    x = torch.randn(shape, generator=generator).to(dtype)
    found = layer.multiply_compiled(x)
    assert found.shape == layer(x).shape and found.dtype == dtype
    exact = x.double() @ dequantize(layer.quantized, layer.scale).double().T
    assert (found - exact).abs().max() <= (1e-5 if dtype is torch.float32 else 1e-2) * exact.abs().max()
