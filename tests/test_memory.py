"""The memory that planner.py computes, against what tensors take here; and memory that is kept."""

import ctypes
import subprocess
import sys

import pytest
import torch
from tiny import ROOT, output, tensor_bytes

import planner
from llama31 import PRESETS, ModelArgs, Transformer, save_checkpoint
from plumbing import fast

SMALL = dict(dim=64, n_layers=8, n_heads=2, n_kv_heads=1, multiple_of=32)


def train(args, batch_size, seq_len, recomputed, model=None):
    """Two steps, each of two micro-batches: the second one finds the gradients of the first."""
    model = model or Transformer(args)
    model.activation_checkpointing = recomputed
    optimizer = model.configure_optimizers(1e-3, compile=False)
    tokens = torch.randint(args.vocab_size, (batch_size, seq_len))
    for _ in range(2):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, tokens)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings, batch_size, seq_len, recomputed", [
    (SMALL | dict(dim=256, n_layers=2, vocab_size=1000), 1, 32, False),  # weights take the most
    (SMALL | dict(dim=256, n_layers=4, vocab_size=1000), 1, 32, True),  # autocast's copies of them, too
    pytest.param(SMALL | dict(vocab_size=300), 2, 256, False, marks=pytest.mark.slow),  # activations
    (SMALL | dict(n_layers=2, vocab_size=64), 4, 256, True),  # a block computed again
    (SMALL | dict(n_layers=1, vocab_size=8000, tie_word_embeddings=True), 1, 64, False),  # the output matrix
    (SMALL | dict(dim=32, n_layers=1, vocab_size=10000), 1, 250, False)])  # logits
def test_training_holds_the_bytes_of_tensors_that_are_computed(settings, batch_size, seq_len, recomputed):
    args = ModelArgs(**settings)
    computed = planner.training_memory(args, batch_size, seq_len, activation_checkpointing=recomputed,
                                     on_cpu=True)
    measured, left = tensor_bytes(lambda: train(args, batch_size, seq_len, recomputed))
    assert left == 0 and computed == pytest.approx(measured, rel=0.03)


def bfloat16_model(args, form):
    """A model in a form of training, on the CPU, with weights of zeros, which take what others do."""
    model = planner.prepared(args, form)
    state = {name: torch.zeros(p.shape, dtype=p.dtype) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie()
    return model


@pytest.mark.parametrize("form", [
    dict(lora_rank=4, quantize="int8"), pytest.param(dict(param_dtype="bfloat16"), marks=pytest.mark.slow),
    pytest.param(dict(lora_rank=4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("settings, batch_size, seq_len, recomputed", [
    pytest.param(SMALL | dict(dim=256, n_layers=4, vocab_size=1000), 1, 16, False,
                 marks=pytest.mark.slow),  # weights take the most
    pytest.param(SMALL | dict(vocab_size=300), 2, 256, True, marks=pytest.mark.slow),
    pytest.param(SMALL | dict(vocab_size=300), 2, 256, False, marks=pytest.mark.slow),  # activations
    (SMALL | dict(n_layers=1, vocab_size=8000, tie_word_embeddings=True), 1, 256, False)])  # logits
def test_other_forms_of_training_hold_the_bytes_computed(form, settings, batch_size, seq_len, recomputed):
    args = ModelArgs(**settings)
    form = planner.FULL | form
    computed = planner.training_memory(args, batch_size, seq_len, activation_checkpointing=recomputed,
                                     on_cpu=True, form=form)
    measured, left = tensor_bytes(lambda: train(args, batch_size, seq_len, recomputed,
                                                bfloat16_model(args, form)))
    assert left == 0 and computed == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_loss_never_widens_a_whole_output_matrix(is_trained):
    x = torch.zeros(64, 256, requires_grad=True)
    weight = torch.zeros(8000, 256, dtype=torch.bfloat16, requires_grad=is_trained)
    targets = torch.zeros(64, dtype=torch.int64)
    most, _ = tensor_bytes(lambda: fast.chunked_cross_entropy(
        x, weight, targets, torch.float32, logits_at_once=8 * 8000, cached_entries=50 * 256).backward())
    gradients = (4 + 2) * weight.numel() if is_trained else 0  # in float32, then in the weight's type
    assert most - gradients < 4 * weight.numel() / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_forward_pass_keeps_exactly_the_bytes_that_are_computed(dtype, recomputed):
    args = ModelArgs(**SMALL, vocab_size=300)
    model = Transformer(args).to(dtype)
    model.activation_checkpointing = recomputed
    tokens = torch.zeros(2, 16, dtype=torch.int64)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            return model(tokens, tokens)

    _, left = tensor_bytes(forward)
    loss_bytes = 4  # They are left, too; the tokens are kept, but were there before.
    assert planner.saved_bytes(args, 2, 16, recomputed, dtype) == left - loss_bytes + tokens.nbytes


def test_the_loss_takes_a_chunk_of_logits_and_their_softmax():
    args = ModelArgs(dim=64, n_layers=1, n_heads=1, vocab_size=2**17)
    matrix = 2 * 64 * 2**17  # in bfloat16
    assert planner.loss_bytes(args, 500) == matrix + (2 + 4 + 4) * 500 * 2**17
    assert planner.loss_bytes(args, 512) == matrix + (2 + 4 + 4) * fast.LOGITS_AT_ONCE
    assert planner.loss_bytes(args, 513) == matrix + (2 + 4 + 4 + 4) * fast.LOGITS_AT_ONCE
    assert planner.loss_bytes(args, 500, fsdp=True) == (2 + 4 + 4) * 500 * 2**17
    cached = fast.CACHED_ENTRIES
    assert planner.loss_bytes(args, 500, on_cpu=True) == matrix + 2 * 500 * 2**17 + (4 + 4 + 4) * cached
    assert planner.loss_bytes(args, 8, on_cpu=True) == matrix + 2 * cached + (4 + 2 + 4) * cached


def test_the_loss_of_few_tokens_takes_the_gradient_of_the_matrix():
    args = ModelArgs(dim=64, n_layers=1, n_heads=1, vocab_size=2**17)
    matrix = 2 * 64 * 2**17
    assert planner.loss_bytes(args, 2) == matrix + (2 + 4) * 2 * 2**17 + matrix
    frozen = planner.FULL | dict(lora_rank=1)
    assert planner.loss_bytes(args, 2, form=frozen) == (2 + 4 + 4) * 2 * 2**17


def test_one_row_of_logits_may_be_larger_than_what_is_handled_at_once():
    args = ModelArgs(dim=2, n_layers=1, n_heads=1, vocab_size=2**27)
    assert planner.loss_bytes(args, 1, on_cpu=True) == 2 * 2 * 2**27 + (2 + 4 + 4) * 2**27


def test_fsdp_shares_out_the_states_and_checkpointing_keeps_less():
    args = ModelArgs(**PRESETS["llama3.2-1b"])

    def size(sharing=1, **settings):
        return planner.training_memory(args, 1, 512, planner.Sharing(sharing), **settings)
    assert size(activation_checkpointing=True) < size() - 500e6
    parameters = 1_235_814_400
    assert 16 * parameters < size(activation_checkpointing=True) < 21 * parameters
    assert size(2) - size(8) == 16 * parameters * 3 / 8


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
@pytest.mark.parametrize("call, is_kept", [
    ("fast.keep_freed_memory(torch.device('cpu'))", True),
    ("model.configure_optimizers(1e-3)", False),
    ("Llama.build(ckpt_dir, device='cpu')", False)])
def test_only_keep_freed_memory_keeps_the_memory_of_freed_tensors(call, is_kept, tmp_path):
    """Counted in page faults, one for each fresh page, before and after the call."""
    model = Transformer(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=8, multiple_of=8))
    save_checkpoint(tmp_path / "ckpt", model.args, model.state_dict())
    code = f"""
import resource, torch
from llama31 import Llama, load_checkpoint
from plumbing import fast
ckpt_dir = {str(tmp_path / "ckpt")!r}
model = load_checkpoint(ckpt_dir)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (1, 9, 40, 80, 40, 9) * 3:
        torch.ones(megabytes * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
fresh = faults()
{call}
faults()
print(fresh, faults())
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    fresh, later = map(int, out.split())
    assert later < 0.1 * fresh if is_kept else later > 0.9 * fresh


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_kept_memory_counts_as_free():
    """This process alone tells what is free: others take memory, and a virtual machine gets more or less."""
    code = """
import psutil, torch
from plumbing import fast, machine
cpu = torch.device("cpu")
machine.free_memory = lambda: 2**40 - psutil.Process().memory_info().rss
fast.keep_freed_memory(cpu)
before = machine.free_memory()
torch.ones(2**30, dtype=torch.uint8)
assert machine.free_memory() < before - 2**29
fast.check_memory("keys and values", before - 2**28, cpu)
"""
    output("-c", code)
