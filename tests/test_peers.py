"""llama31.py against the two implementations that checkpoints come from: Hugging Face's and Meta's own.

Random weights, always float32, and max|a-b| <= 1e-5 max|b| for every tensor.
"""

import json
import shutil

import pytest
import torch
from hugging_face import hugging_face, renamed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    NARROW,
    RESCALED,
    SHAPE,
    UNSLOWED,
    WIDE,
    assert_close,
    random_model,
    random_tokens,
    rope_bands,
    write_checkpoint,
)

import llama31

# -----------------------------------------------------------------------------
# Hugging Face's LlamaForCausalLM

def assert_peers(changes, tokens, labels, seed=3, attention="eager"):
    """Logits, loss and gradients over tokens (B, T); labels: the same with -100 where they don't count."""
    model = random_model(seed, **changes)
    state = {name: tensor.clone().requires_grad_() for name, tensor in model.state_dict().items()}
    theirs = hugging_face(model.args, state, attention)
    expected = theirs(tokens, labels=labels)
    with torch.no_grad():
        assert_close(model(tokens), expected.logits, "logits")
    loss = model(tokens[:, :-1], labels[:, 1:])
    assert_close(loss, expected.loss, "loss")
    loss.backward()
    expected.loss.backward()
    gradients = renamed({name: p.grad for name, p in model.named_parameters()}, model.args.head_dim)
    named = dict(theirs.named_parameters())
    assert gradients.keys() == named.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, named[name].grad, name, negligible=1e-7)  # 0 in exact arithmetic
    return model


HF_CONFIGURATIONS = {
    "mha": dict(n_kv_heads=4),
    "gqa, tied": dict(n_kv_heads=2, tie_word_embeddings=True, norm_eps=1e-3),
    "mqa, multiplier": dict(n_kv_heads=1, ffn_dim_multiplier=1.3, rope_theta=10000.0),
    "gqa scaled by 8": dict(n_kv_heads=2, use_scaled_rope=True),
    "gqa scaled by 32, tied": dict(n_kv_heads=2, use_scaled_rope=True, rope_scale_factor=32,
                                   tie_word_embeddings=True),
    "mha scaled by 32": dict(n_heads=2, n_kv_heads=2, use_scaled_rope=True, rope_scale_factor=32),
    "gqa, narrow heads": NARROW,
    "gqa, wide heads, tied": dict(WIDE, tie_word_embeddings=True),
    "mqa, wide heads": dict(WIDE, n_kv_heads=1),
    "scaled by other numbers": RESCALED,
    "scaled by other numbers, wide heads": dict(RESCALED, **WIDE),
    "scaled by 1": UNSLOWED}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", HF_CONFIGURATIONS.values(), ids=HF_CONFIGURATIONS)
def test_hugging_face_has_our_logits_loss_and_gradients(changes, attention):
    tokens = random_tokens(3, 60)
    labels = tokens.clone()
    labels[0, 3:9], labels[1, 1], labels[2, 20:] = -100, -100, -100
    assert_peers(changes, tokens, labels, attention=attention)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_hugging_face_agrees_on_any_small_configuration(data):
    def draw(*options):
        return data.draw(st.sampled_from(options))
    n_kv_heads, group, pairs, vocab_size = draw(1, 2, 3), draw(1, 2, 3), draw(2, 3, 8), draw(7, 50)
    changes = dict(
        n_heads=n_kv_heads * group, n_kv_heads=n_kv_heads, dim=2 * pairs * n_kv_heads * group,
        n_layers=draw(1, 2, 3), vocab_size=vocab_size, multiple_of=draw(1, 8, 32),
        ffn_dim_multiplier=draw(None, 0.6, 1.3), norm_eps=draw(1e-5, 1e-2),
        rope_theta=draw(500000.0, 10000.0, 100.0), use_scaled_rope=draw(False, True),
        rope_scale_factor=draw(8, 32, 3.7), tie_word_embeddings=draw(False, True),
        head_dim=draw(None, 6, 20), rope_low_freq_factor=draw(1.0, 0.3),
        rope_high_freq_factor=draw(4.0, 1.1, 50), rope_old_context=draw(8192, 512))
    # of three tokens or fewer, gradients of wq and wk are nearly 0, differences of much larger numbers
    tokens = random_tokens(draw(1, 2, 3), draw(9, 20, 40), high=vocab_size,
                           seed=data.draw(st.integers(0, 1000)))
    assert_peers(changes, tokens, tokens)


@pytest.mark.parametrize("numbers, tied", [
    *(pytest.param(dict(rope_scale_factor=factor), tied, marks=pytest.mark.slow)
      for factor, tied in ((8, False), (32, True))),
    (dict(rope_scale_factor=5, rope_low_freq_factor=0.5, rope_high_freq_factor=32, rope_old_context=4096),
     False)])
def test_hugging_face_agrees_where_only_positions_past_8192_count(numbers, tied):
    changes = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, use_scaled_rope=True,
                   tie_word_embeddings=tied, **numbers)
    tokens = random_tokens(1, 8320)
    labels = tokens.clone()
    labels[:, :8200] = -100
    model = assert_peers(changes, tokens, labels, attention="sdpa")
    assert min(rope_bands(changes)) > 0
    plain = llama31.Transformer(llama31.ModelArgs(**{**vars(model.args), "use_scaled_rope": False}))
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():  # the scaling is seen there
        assert (model(tokens) - plain(tokens))[:, 8192:].abs().max() > 1e-2


# -----------------------------------------------------------------------------
# Meta's Transformer

NEW = 20  # tokens that Meta's model continues a prompt by
META_PROMPTS = [[1], [5, 6, 7, 8], [4, 3] * 10, [*range(40)]]
META_CONFIGURATIONS = {
    "mha": dict(n_kv_heads=4, vocab_size=104),
    "gqa": dict(n_kv_heads=2, vocab_size=104, ffn_dim_multiplier=1.3, norm_eps=1e-3),
    "gqa scaled by 8, tied": dict(n_kv_heads=2, vocab_size=104, use_scaled_rope=True,
                                  tie_word_embeddings=True),
    "mha scaled by 8": dict(n_heads=2, n_kv_heads=2, vocab_size=104, use_scaled_rope=True,
                            rope_theta=10000.0)}


def cut_as_fairscale(model, whole):
    """This process's part of a whole state dict, cut by the constructors of the layers of Meta's model."""
    from fairscale.nn.model_parallel.layers import VocabParallelEmbedding
    part = dict(whole)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("fairscale"):
            weight = whole[f"{name}.weight"]
            sizes = (weight.shape if isinstance(module, VocabParallelEmbedding) else
                     (*weight.shape[::-1], False))  # in_features, out_features, bias
            with torch.no_grad():
                cut = type(module)(*sizes, init_method=lambda whole, weight=weight: whole.copy_(weight))
            part[f"{name}.weight"] = cut.weight.detach()
    return part


def meta_peer(rank, folders):
    """Runs Meta's model over checkpoints, alone and as one of two processes that hold a part each.

    FOLDER/1 is the checkpoint; FOLDER/2 gets the two files that fairscale makes of it. FOLDER/1.pt and
    FOLDER/2.pt get lists of (tokens with their greedy continuation, logits at each but the last).
    """
    import torch.distributed as dist
    from fairscale.nn.model_parallel import initialize
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folders[0]}/store", rank=rank, world_size=2)
    for size in (1, 2):
        initialize.initialize_model_parallel(size)
        for folder in folders:
            file = folder / str(size) / f"consolidated.{initialize.get_model_parallel_rank():02}.pth"
            params = json.loads((file.parent / "params.json").read_text())
            model = Transformer(ModelArgs(**params, max_batch_size=1))
            if size == 2:
                whole = torch.load(folder / "1" / "consolidated.00.pth", weights_only=True)
                torch.save(cut_as_fairscale(model, whole), file)
            model.load_state_dict(torch.load(file, weights_only=True))
            results = []
            for prompt in META_PROMPTS:
                row, logits = list(prompt), [model(torch.tensor([prompt]), 0)[0]]
                for _ in range(NEW):
                    row.append(int(logits[-1][-1].argmax()))
                    logits.append(model(torch.tensor([row[-1:]]), len(row) - 1)[0])
                results.append((row, torch.cat(logits)[:-1]))
            if rank == 0:
                torch.save(results, folder / f"{size}.pt")
        initialize.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def meta_folder(tmp_path_factory):
    """A folder with one of meta_peer's folders for each configuration."""
    pytest.importorskip("llama_models")
    pytest.importorskip("fairscale")
    folder = tmp_path_factory.mktemp("meta")
    for name, changes in META_CONFIGURATIONS.items():
        write_checkpoint(folder / name / "1", random_model(3, **changes), params={**SHAPE, **changes})
        (folder / name / "2").mkdir()
        shutil.copy(folder / name / "1" / "params.json", folder / name / "2")
    torch.multiprocessing.spawn(meta_peer, ([folder / name for name in META_CONFIGURATIONS],), nprocs=2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("name", META_CONFIGURATIONS)
def test_metas_transformer_has_our_logits_and_greedy_tokens(name, files, meta_folder):
    llama = llama31.Llama.build(meta_folder / name / str(files), device="cpu")
    results = torch.load(meta_folder / name / f"{files}.pt", weights_only=True)
    for row, logits in results:
        with torch.inference_mode():
            assert_close(llama.model(torch.tensor([row[:-1]]))[0], logits)
    rows = [row for row, _ in results]

    def greedy(prompts):
        return llama.generate(prompts, NEW, temperature=0, echo=True)
    assert greedy(META_PROMPTS) == rows == [greedy([prompt])[0] for prompt in META_PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", META_CONFIGURATIONS)
def test_files_that_fairscale_cut_are_merged_to_the_whole(name, meta_folder):
    whole, merged = (llama31.Llama.build(meta_folder / name / files, device="cpu").model.state_dict()
                     for files in "12")
    assert whole.keys() == merged.keys() and all(torch.equal(merged[key], whole[key]) for key in whole)
