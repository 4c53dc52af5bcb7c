"""convert.py against transformers, both ways: the same bytes, logits, token ids and texts.

Always float32 where numbers are compared, and max|a-b| <= 1e-5 max|b|.
"""

import json
import os
import resource
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import (
    NARROW,
    RESCALED,
    SCALED,
    WIDE,
    assert_close,
    output,
    random_model,
    random_tokens,
    write_checkpoint,
)

import convert
import llama31
import reference
from plumbing import cli, huggingface
from plumbing.config_json import FIELDS, ROPE_FIELDS
from plumbing.vocabularies import write_tokenizer_json, write_tokenizer_model
from tokenizer import Tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
llama_models = pytest.importorskip("llama_models.llama3.tokenizer")
META_TOKENIZER = Path(llama_models.__file__).parent / "tokenizer.model"

EIGHTHS = dict(dim=64, n_kv_heads=4, vocab_size=104)  # what eight files can share
CONFIGURATIONS = {
    "mha": dict(n_kv_heads=4, vocab_size=104),
    "gqa, tied": dict(n_heads=8, n_kv_heads=2, norm_eps=1e-3, tie_word_embeddings=True, vocab_size=104),
    "scaled by 8, mqa": dict(SCALED, n_kv_heads=1, rope_scale_factor=8, vocab_size=104),
    "scaled by 32, tied": dict(SCALED, n_kv_heads=2, rope_scale_factor=32, tie_word_embeddings=True,
                               vocab_size=104, ffn_dim_multiplier=1.3, rope_theta=1e6),
    "narrow heads": {**NARROW, **EIGHTHS},
    "wide heads, scaled by other numbers": {**RESCALED, **WIDE, **EIGHTHS},
}
each_configuration = pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
SMALL = dict(max_file_bytes=60_000)  # several files


def save_hf(folder, dtype=torch.float32, max_shard_size="5GB", seed=0, **changes):
    """Saves a random LlamaForCausalLM as transformers does, and returns it."""
    fields = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=104, max_position_embeddings=128, rms_norm_eps=1e-5,
                  initializer_range=0.1)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, **changes})).eval().to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load_hf(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights(folder):
    """Name -> (dtype, shape, bytes) of every tensor of a folder of either format."""
    if (folder / "params.json").exists():
        _, pieces = llama31.open_checkpoint(folder)
        state = {name: parts.whole() for name, parts in pieces.items()}
    else:
        state = {}
        for path in folder.glob("*.safetensors"):
            state |= load_file(path)
    return {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes())
            for name, t in state.items()}


# -----------------------------------------------------------------------------
# Weights


LLAMA3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500000.0,
              original_max_position_embeddings=8192)


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    dict(),
    dict(num_key_value_heads=None, tie_word_embeddings=True, max_shard_size="40KB"),
    dict(num_attention_heads=2, num_key_value_heads=1, rope_parameters=dict(LLAMA3, factor=8.0),
         intermediate_size=160, max_shard_size="40KB"),
    dict(num_attention_heads=2, rope_parameters=dict(LLAMA3, factor=32.0), intermediate_size=163,
         tie_word_embeddings=True, rms_norm_eps=1e-3),
    dict(head_dim=10, max_shard_size="40KB"), dict(head_dim=40, tie_word_embeddings=True),
    dict(rope_parameters=dict(rope_type="llama3", low_freq_factor=2, high_freq_factor=16.0, rope_theta=1e4,
                              original_max_position_embeddings=512, factor=4)),
], ids=["default", "mha, tied, many files", "scaled by 8, mqa, many files", "scaled by 32, tied, odd size",
        "narrow heads, many files", "wide heads, tied", "scaled by other numbers"])
def test_a_model_of_transformers_has_the_same_logits_here(changes, tmp_path):
    theirs = save_hf(tmp_path / "hf", **changes)
    assert (tmp_path / "hf" / convert.INDEX).exists() == ("max_shard_size" in changes)
    convert.from_hf(tmp_path / "hf", tmp_path / "meta")
    ours = llama31.load_checkpoint(tmp_path / "meta")
    tokens = random_tokens(2, 90)
    assert_close(ours(tokens), theirs(tokens).logits)
    assert ours.args.tie_word_embeddings == changes.get("tie_word_embeddings", False)
    assert ours.args.max_seq_len == 128


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tied_weights_are_written_once_whatever_the_type(dtype, tmp_path):
    save_hf(tmp_path / "hf", tie_word_embeddings=True)
    convert.from_hf(tmp_path / "hf", tmp_path / "meta", dtype=dtype)
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("files", [1, 8])
@each_configuration
def test_a_checkpoint_has_the_same_logits_in_transformers(changes, files, tmp_path):
    if changes.get("n_kv_heads", 8) * 16 % files or changes.get("n_heads", 4) == 2:
        files = min(files, 2)
    ours = random_model(3, **changes)
    write_checkpoint(tmp_path / "meta", ours, files)
    convert.to_hf(tmp_path / "meta", tmp_path / "hf", **(SMALL if files > 1 else {}))
    theirs = load_hf(tmp_path / "hf")
    tokens = random_tokens(2, 90)
    assert_close(theirs(tokens).logits, ours(tokens))
    assert theirs.config.max_position_embeddings == 128
    assert theirs.config.tie_word_embeddings == ours.args.tie_word_embeddings


@pytest.mark.parametrize("dtype", [
    torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow),
    pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("files", [1, 8])
@each_configuration
def test_meta_to_hugging_face_to_meta_keeps_every_byte(changes, files, dtype, tmp_path):
    model = random_model(3, **changes).to(dtype)
    write_checkpoint(tmp_path / "a", model, files)
    convert.to_hf(tmp_path / "a", tmp_path / "b", **(SMALL if files > 1 else {}))
    convert.from_hf(tmp_path / "b", tmp_path / "c")
    assert weights(tmp_path / "c") == weights(tmp_path / "a")
    assert weights(tmp_path / "c")["norm.weight"][0] == dtype
    assert transformers.AutoConfig.from_pretrained(tmp_path / "b").dtype == dtype
    args = llama31.open_checkpoint(tmp_path / "c")[0].args
    for name in ("hidden_dim", *FIELDS, "rope_theta", "use_scaled_rope", *ROPE_FIELDS):
        assert getattr(args, name) == getattr(model.args, name), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_hugging_face_to_meta_to_hugging_face_keeps_every_byte(size, tied, dtype, tmp_path):
    save_hf(tmp_path / "a", dtype, size, tie_word_embeddings=tied)
    convert.from_hf(tmp_path / "a", tmp_path / "b")
    convert.to_hf(tmp_path / "b", tmp_path / "c", **(SMALL if size == "40KB" else {}))
    assert weights(tmp_path / "c") == weights(tmp_path / "a")
    assert ("lm_head.weight" in weights(tmp_path / "c")) != tied
    assert ("lm_head.weight" in weights(tmp_path / "a")) != tied


def test_files_hold_at_most_so_many_bytes_and_one_is_in_memory_at_a_time(tmp_path, monkeypatch):
    written = []  # of the last file, what was not merely mapped

    def save(tensors, path, metadata):
        written[:] = [weakref.ref(t) for name, t in tensors.items() if "q_proj" in name or "k_proj" in name]
        save_file(tensors, path, metadata)

    def reordered(*args, real=convert.reordered, **settings):
        assert all(ref() is None for ref in written)
        return real(*args, **settings)

    monkeypatch.setattr(huggingface, "save_file", save)
    monkeypatch.setattr(convert, "reordered", reordered)
    write_checkpoint(tmp_path / "meta", random_model(**CONFIGURATIONS["mha"]))
    convert.to_hf(tmp_path / "meta", tmp_path / "hf", **SMALL)
    index = json.loads((tmp_path / "hf" / convert.INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        assert (tmp_path / "hf" / file).stat().st_size <= SMALL["max_file_bytes"]
        tensors = load_file(tmp_path / "hf" / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        total += sum(t.nbytes for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert {oct(path.stat().st_mode) for path in (tmp_path / "hf").iterdir()} == {
        oct((tmp_path / "meta" / "params.json").stat().st_mode)}


def test_a_tensor_larger_than_a_file_may_be_gets_its_own(tmp_path):
    write_checkpoint(tmp_path / "meta", random_model(**CONFIGURATIONS["mha"]))
    convert.to_hf(tmp_path / "meta", tmp_path / "hf", max_file_bytes=1)
    assert all(len(load_file(path)) == 1 for path in (tmp_path / "hf").glob("*.safetensors"))


# -----------------------------------------------------------------------------
# config.json

OFFICIAL = dict(  # of Llama 3.1 8B
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
    eos_token_id=128001, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
    intermediate_size=14336, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
    rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_type="llama3",
                      original_max_position_embeddings=8192),
    rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.43.0",
    use_cache=True, vocab_size=128256)


def read(folder, **changes):
    config = {name: value for name, value in {**OFFICIAL, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return llama31.read_args(folder)


@pytest.mark.parametrize("preset, changes", [
    ("llama3.1-8b", dict()),
    ("llama3.1-70b", dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64)),
    ("llama3.1-405b", dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126,
                           num_attention_heads=128)),
    ("llama3.2-1b", dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                         rope_scaling={**OFFICIAL["rope_scaling"], "factor": 32.0},
                         tie_word_embeddings=True)),
    ("llama3.2-3b", dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, head_dim=128,
                         num_attention_heads=24, rope_scaling={**OFFICIAL["rope_scaling"], "factor": 32.0},
                         tie_word_embeddings=True)),
])
def test_published_models_get_metas_own_numbers(preset, changes, tmp_path):
    expected = llama31.ModelArgs(**llama31.PRESETS[preset], max_seq_len=131072)
    assert read(tmp_path, **changes) == expected


def test_rope_is_read_where_any_release_of_transformers_has_it(tmp_path):
    plain = dict(rope_scaling=None, rope_theta="absent")
    for kind, factor in (("llama3", 8.0), ("default", None)):
        parameters = {**OFFICIAL["rope_scaling"], "rope_type": kind, "factor": factor, "rope_theta": 7e4}
        newer = read(tmp_path, **plain, rope_parameters=parameters)
        assert (newer.rope_theta, newer.use_scaled_rope) == (7e4, kind == "llama3")
    unscaled = read(tmp_path, rope_scaling=None)
    assert (unscaled.rope_theta, unscaled.use_scaled_rope) == (500000.0, False)
    old = read(tmp_path, **plain, num_key_value_heads="absent", rms_norm_eps="absent", head_dim=None,
               max_position_embeddings="absent", tie_word_embeddings="absent", attention_bias="absent")
    theirs = transformers.LlamaConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert (old.rope_theta, old.n_kv_heads) == (theirs.rope_parameters["rope_theta"], 32)
    assert (old.norm_eps, old.max_seq_len) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert old.tie_word_embeddings == theirs.tie_word_embeddings


def test_the_old_context_is_the_one_that_transformers_takes(tmp_path):
    name = "original_max_position_embeddings"
    numbers = {key: value for key, value in OFFICIAL["rope_scaling"].items() if key != name}
    for changes in (scaling(**{name: 4096}), {**scaling(**{name: 4096}), name: 512},
                    dict(rope_scaling=numbers), {"rope_scaling": numbers, name: 512}):
        args = read(tmp_path, **changes)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        theirs.standardize_rope_params()
        assert args.rope_old_context == theirs.rope_parameters[name]


def test_published_widths_of_heads_are_read(tmp_path):
    minitron = dict(hidden_size=3072, intermediate_size=9216, head_dim=128)
    assert read(tmp_path, **minitron).head_dim == 128 != 3072 // 32
    kanana = dict(hidden_size=1792, intermediate_size=8064, head_dim=128, num_attention_heads=24)
    assert read(tmp_path, **kanana).head_dim == 128  # 24 divides no 1792.


@pytest.mark.parametrize("hidden_dim", [1, 2, 49, 63, 103, 170, 171, 172, 175, 192, 1024, 1023])
def test_any_swiglu_size_is_expressed_exactly(hidden_dim, tmp_path):
    args = read(tmp_path, hidden_size=64, intermediate_size=hidden_dim, num_attention_heads=8)
    assert args.hidden_dim == hidden_dim


def test_smollm2s_swiglu_size_needs_no_multiplier(tmp_path):
    args = read(tmp_path, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                num_key_value_heads=3)
    assert (args.multiple_of, args.ffn_dim_multiplier) == (256, None)


def scaling(**changes):
    return dict(rope_scaling={**OFFICIAL["rope_scaling"], **changes})


@pytest.mark.parametrize("changes, named", [
    (dict(model_type="mistral"), "model_type is 'mistral', expected 'llama'"),
    (dict(model_type="absent"), "model_type is None"),
    (dict(attention_bias=True), "attention_bias is True, expected False"),
    (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    (dict(sliding_window=4096), "sliding_window is 4096"),
    (dict(head_dim=65), " head_dim is 65; expected an even number"),
    (dict(head_dim="128"), " head_dim is '128'"),
    (dict(quantization_config=dict(quant_method="awq")), "quantization_config"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(pretraining_tp=2), "pretraining_tp is 2"),
    (dict(intermediate_size=0), "intermediate_size is 0"),
    (dict(intermediate_size="absent"), "intermediate_size is None"),
    (dict(intermediate_size=14336.5), "intermediate_size is 14336.5"),
    (dict(hidden_size="absent"), " hidden_size is None"),
    (dict(hidden_size=100), " hidden_size is 100; expected a multiple of num_attention_heads 32"),
    (dict(hidden_size=96), " head_dim is 3; expected an even number"),
    (dict(num_hidden_layers="2"), "num_hidden_layers is '2'"),
    (dict(num_attention_heads=0), "num_attention_heads is 0"),
    (dict(num_key_value_heads=5), "num_key_value_heads is 5; .* of num_attention_heads, here 32"),
    (dict(vocab_size=1.5), "vocab_size is 1.5"),
    (dict(rms_norm_eps=-1), "rms_norm_eps is -1"),
    (dict(max_position_embeddings=0), "max_position_embeddings is 0"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    (dict(rope_theta="big"), "rope_theta is 'big'"),
    (scaling(rope_type="yarn"), "rope_type is 'yarn', expected 'default' or 'llama3'"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type is 'linear'"),
    (dict(rope_scaling=dict(type="dynamic", factor=2.0)), "rope_type is 'dynamic'"),
    (scaling(low_freq_factor=4.0), " high_freq_factor is 4.0; expected more than low_freq_factor 4.0"),
    (scaling(low_freq_factor=0), " low_freq_factor is 0"),
    (scaling(high_freq_factor=None), " high_freq_factor is None"),
    (dict(original_max_position_embeddings=0), " original_max_position_embeddings is 0"),
    (scaling(original_max_position_embeddings=None), "original_max_position_embeddings is None"),
    (scaling(factor=None), " factor is None"),
    (scaling(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(rope_scaling=None, rope_parameters=dict(rope_type="longrope")), "rope_type is 'longrope'"),
    (dict(rope_scaling=dict(rope_type="proportional")), "rope_type is 'proportional', .* 'llama3'"),
])
def test_what_is_no_llama_is_refused_by_name(changes, named, tmp_path):
    with pytest.raises(ValueError, match=named) as caught:
        read(tmp_path, **changes)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_damage(small, tmp_path):
    shutil.copytree(small / "hf", tmp_path / "hf")
    for name in ("config.json", "tokenizer.json"):
        path = tmp_path / "hf" / name
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    convert.from_hf(tmp_path / "hf", tmp_path / "meta")
    made = (tmp_path / "meta" / "tokenizer.model").read_bytes()
    assert made == (small / "meta" / "tokenizer.model").read_bytes()


# -----------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory):
    """The folder of a model of a small vocabulary, meta, and of its conversion, hf."""
    folder = tmp_path_factory.mktemp("small")
    model = random_model(3, vocab_size=tokenizer.n_words, max_seq_len=256)
    write_checkpoint(folder / "meta", model, tokenizer=tokenizer)
    convert.to_hf(folder / "meta", folder / "hf")
    shutil.copy(tokenizer.model_path, folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of a Hugging Face tokenizer made from Meta's."""
    folder = tmp_path_factory.mktemp("large")
    write_tokenizer_json(folder, Tokenizer(META_TOKENIZER), 128)
    return folder


@pytest.fixture(scope="module", params=["small", pytest.param("large", marks=pytest.mark.slow)])
def pair(request, small):
    """Our Tokenizer and that of transformers, of one vocabulary."""
    if request.param == "small":
        path, folder = small / "tokenizer.model", small / "hf"
    else:
        path, folder = META_TOKENIZER, request.getfixturevalue("large")
    return Tokenizer(path), transformers.AutoTokenizer.from_pretrained(folder)


TEXTS = st.one_of(
    st.text(), st.text(st.sampled_from("ab 's'tLL1203 \t\n\r\u00a0\u3000éŉ你🦙<|>_-!\u0301\0")),
    st.lists(st.sampled_from(["<|eot_id|>", "<|begin_of_text|>", "<|reserved_special_token_3|>", " ", "it's",
                              "DON'T", "12345", "\n\n", "  ", "ſ", "the cat", "\r\n"])).map("".join))


@settings(deadline=None, derandomize=True, max_examples=80)
@example("").via("edge")
@example("  two   three    \t\ttabs \n \n\n x").via("edge")
@example(" việc hợp nhiều mektedir").via("tokens of Llama 3 that no merges make")
@given(text=TEXTS)
def test_any_text_has_the_same_ids_in_transformers(pair, text):
    ours, theirs = pair
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text, bos=True)
    assert theirs.encode(text, split_special_tokens=True, add_special_tokens=False) == ours.encode(text)
    assert theirs(text)["input_ids"] == ours.encode(text, bos=True, allowed_special="all")
    assert theirs.decode(ours.encode(text)) == text


def test_special_tokens_have_their_ids_and_roles(pair):
    ours, theirs = pair
    assert len(theirs) == ours.n_words
    assert {name: theirs.convert_tokens_to_ids(name) for name in ours.special_tokens} == ours.special_tokens
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id, ours.eos_id, ours.pad_id)
    ids = ours.encode("the cat", bos=True, eos=True)
    assert theirs.decode(ids, skip_special_tokens=True) == "the cat"
    assert list(theirs("the cat")) == ["input_ids", "attention_mask"]


CONTENTS = TEXTS.filter(lambda text: "<|" not in text)  # What spells a special token has other ids there.
ARGUMENTS = st.dictionaries(CONTENTS, st.none() | st.booleans() | st.integers() | CONTENTS, max_size=3)
FUNCTIONS = st.fixed_dictionaries({"name": CONTENTS, "arguments": ARGUMENTS})
MESSAGES = st.one_of(
    st.fixed_dictionaries({
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "ipython"]),
        "content": CONTENTS | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": CONTENTS}))}),
    st.fixed_dictionaries({
        "role": st.just("assistant"),
        "tool_calls": st.lists(FUNCTIONS | st.fixed_dictionaries({"function": FUNCTIONS}), max_size=1,
                               min_size=1)}, optional={"content": st.none() | CONTENTS}))


@settings(deadline=None, derandomize=True, max_examples=100)
@example([dict(role="system", content="\n Be  good. ")], True).via("white space at both ends")
@given(dialog=st.lists(MESSAGES, min_size=1, max_size=5), prompt=st.booleans())
def test_any_dialog_has_the_ids_of_our_chat_format(pair, dialog, prompt):
    ours, theirs = pair
    ids = theirs.apply_chat_template(dialog, add_generation_prompt=prompt, return_dict=False)
    assert ids == ours.encode_dialog(dialog, generation_prompt=prompt)


def test_our_template_refuses_two_calls_at_once_as_our_chat_format_does(pair):
    ours, theirs = pair
    dialog = [dict(role="assistant", tool_calls=[dict(name="f", arguments={})] * 2)]
    for render in theirs.apply_chat_template, ours.encode_dialog:
        with pytest.raises(Exception, match="call.* at a time"):
            render(dialog)


@pytest.mark.slow
def test_metas_file_comes_back_byte_for_byte(large, tmp_path):
    write_tokenizer_model(large / "tokenizer.json", tmp_path / "a", 128256)
    assert (tmp_path / "a").read_bytes() == META_TOKENIZER.read_bytes()


@pytest.mark.slow
def test_metas_file_comes_out_of_transformers_own_conversion(tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter
    names = list(Tokenizer(META_TOKENIZER).special_tokens)
    TikTokenConverter(str(META_TOKENIZER), extra_special_tokens=names).converted().save(
        str(tmp_path / "tokenizer.json"))
    write_tokenizer_model(tmp_path / "tokenizer.json", tmp_path / "a", 128256)
    assert (tmp_path / "a").read_bytes() == META_TOKENIZER.read_bytes()


def rename(data, old, new):
    next(token for token in data["added_tokens"] if token["content"] == old)["content"] = new


def edited(small, folder, edit):
    """Edits the small tokenizer.json, converts it, and returns the file's bytes, or the refusal."""
    data = json.loads((small / "hf" / "tokenizer.json").read_text())
    edit(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    try:
        write_tokenizer_model(folder / "tokenizer.json", folder / "tokenizer.model", 560)
    except ValueError as error:
        return str(error)
    return (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("edit", [
    lambda data: None,
    lambda data: data["model"].update(merges=[" ".join(merge) for merge in data["model"]["merges"]]),
    lambda data: rename(data, "<|eom_id|>", "<|reserved_special_token_4|>"),  # as in Llama 3
    lambda data: rename(data, "<|reserved_special_token_2|>", "<|step_id|>"),  # as in Meta's later code
    lambda data: data["model"]["vocab"].update({t["content"]: t["id"] for t in data["added_tokens"]}),
], ids=["ours", "older merges", "Llama 3's names", "later names", "special tokens in the vocabulary"])
def test_a_small_tokenizer_comes_back_byte_for_byte(small, edit, tmp_path):
    assert edited(small, tmp_path, edit) == (small / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("edit", [
    lambda data: data["model"].update(type="Unigram"),
    lambda data: data.update(normalizer=dict(type="NFC")),
    lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"),
    lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    lambda data: data.update(pre_tokenizer=None),
    lambda data: data["model"]["merges"].reverse(),
    lambda data: data["model"]["merges"].append(["a", "no"]),
    lambda data: data["added_tokens"].pop(),
    lambda data: rename(data, "<|eot_id|>", "<|im_end|>"),
    lambda data: rename(data, "<|reserved_special_token_3|>", "<|im_end|>"),
    lambda data: data["model"]["vocab"].pop("a"),
    lambda data: data["model"]["vocab"].update(zzzz=data["model"]["vocab"].pop("Ā")),  # no token for byte 0
    lambda data: data["model"]["vocab"].update(Ā=9999),  # no token of some rank
    lambda data: data.pop("model"),
    lambda data: data["added_tokens"].append(dict(id=560, content="<|pad|>")),
])
def test_another_tokenizer_is_refused(small, edit, tmp_path):
    assert "tokenizer.json is not Llama 3's" in edited(small, tmp_path, edit)


# -----------------------------------------------------------------------------
# The whole way


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_another_tokenizers_files_come_back_byte_for_byte(small, dtype, tmp_path):
    folder = shutil.copytree(small / "hf", tmp_path / "hf")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["pre_tokenizer"] = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}\n")
    (folder / "special_tokens_map.json").write_text('{"eos_token":"<|end_of_text|>"}')
    convert.from_hf(folder, tmp_path / "meta", dtype=dtype)
    convert.to_hf(tmp_path / "meta", tmp_path / "again")
    convert.to_hf(tmp_path / "meta", tmp_path / "float32", dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                 "special_tokens_map.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    stored = getattr(torch, dtype or "float32")
    assert {kind for kind, *_ in weights(tmp_path / "again").values()} == {stored}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").dtype == stored
    tokens = random_tokens(2, 60, high=560)
    ours = llama31.load_checkpoint(tmp_path / "meta", dtype=torch.float32)(tokens)
    for name in "again", "float32":
        assert_close(load_hf(tmp_path / name)(tokens).logits, ours)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    text = "it's 2024, Zoë 🦙"
    assert tokenizer(text).input_ids == Tokenizer(folder / "tokenizer.json").encode(text, bos=True)


METAS_LOADER = """
import os, sys, torch, types
# It transforms images, which no text needs, by torchvision, which is large.
images = types.ModuleType("image_transform")
images.VariableSizeImageTransform = None
sys.modules["llama_models.llama3.multimodal.image_transform"] = images
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from llama_models.llama3.generation import Llama3
llama = Llama3.build(sys.argv[1], max_seq_len=32, max_batch_size=1, device="cpu")
torch.save(llama.model.float().forward(torch.arange(20)[None], 0), sys.argv[2])
"""


@pytest.mark.slow
@torch.no_grad()
def test_metas_own_loader_reads_a_folder_that_comes_from_hugging_face(tmp_path):
    pytest.importorskip("fairscale")
    model = random_model(4, vocab_size=128256, n_layers=1, use_scaled_rope=True)
    model.bfloat16().float()  # Their loader rounds weights to bfloat16.
    write_checkpoint(tmp_path / "ours", model, tokenizer=Tokenizer(META_TOKENIZER))
    convert.to_hf(tmp_path / "ours", tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "meta")
    output("-c", METAS_LOADER, tmp_path / "meta", tmp_path / "logits.pt")
    assert_close(torch.load(tmp_path / "logits.pt"), model(torch.arange(20)[None]))


def test_greedy_texts_are_the_same_in_transformers_and_back(small, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small / "hf")
    convert.from_hf(small / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (small / "tokenizer.model").read_bytes()
    prompts = ["the cat", "Zoë saw 🦙 and", "a big"]
    outputs = [theirs.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=50)[0, 1:]
               for prompt in prompts]  # from where <|begin_of_text|> ends
    assert all(len(set(output.tolist())) > 20 for output in outputs)
    for folder in (small / "meta", tmp_path / "back"):
        completions = llama31.Llama.build(folder, device="cpu").text_completion(
            prompts, 50, temperature=0, echo=True)
        assert [c["generation"] for c in completions] == [tokenizer.decode(output) for output in outputs]


def test_transformers_stops_where_llama31_stops(small):
    tokenizer = Tokenizer(small / "tokenizer.model")
    stops = [tokenizer.eos_id, tokenizer.eom_id, tokenizer.eot_id]
    written = json.loads((small / "hf" / "generation_config.json").read_text())
    assert written["eos_token_id"] == stops and written["bos_token_id"] == tokenizer.bos_id
    generation_config = transformers.AutoModelForCausalLM.from_pretrained(small / "hf").generation_config
    assert generation_config.eos_token_id == stops and not generation_config.do_sample


def test_without_a_tokenizer_no_id_is_special(tmp_path):
    write_checkpoint(tmp_path / "meta", random_model(**CONFIGURATIONS["mha"]))
    convert.to_hf(tmp_path / "meta", tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    theirs = load_hf(tmp_path / "hf")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, None)
    assert theirs.generation_config.eos_token_id is None


def test_a_tokenizer_that_cannot_be_read_is_left_out_in_one_line(small, tmp_path, capsys):
    shutil.copytree(small / "hf", tmp_path / "hf")
    foreign = (small / "hf" / "tokenizer.json").read_text().replace('"ByteLevel"', '"Metaspace"')
    for content in (None, "{}", "{", foreign):
        (tmp_path / "hf" / "tokenizer.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "hf" / "tokenizer.json").write_text(content)
        convert.from_hf(tmp_path / "hf", tmp_path / "meta")
        said = capsys.readouterr()
        assert said.err.startswith("only weights are converted: ") and said.err.count("\n") == 1
        assert "tokenizer.json" in said.err and not said.out
        assert weights(tmp_path / "meta") == weights(small / "meta")
        assert not (tmp_path / "meta" / "tokenizer.model").exists()
        shutil.rmtree(tmp_path / "meta")


def test_a_template_of_its_own_is_not_left_out_without_a_word(small, tmp_path, capsys):
    shutil.copytree(small / "hf", tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "ours")
    assert not capsys.readouterr().err
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    convert.from_hf(tmp_path / "hf", tmp_path / "other")
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'hf'}: its chat template is left out") and said.count("\n") == 1


def test_metas_params_without_a_context_length_get_the_published_one(tmp_path):
    for scaled, length in ((True, 131072), (False, 8192)):
        write_checkpoint(tmp_path / "meta", random_model(use_scaled_rope=scaled))
        params = json.loads((tmp_path / "meta" / "params.json").read_text())
        del params["max_seq_len"]
        (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
        assert reference.Llama.build(tmp_path / "meta").max_seq_len == length
        convert.to_hf(tmp_path / "meta", tmp_path / "hf")
        assert load_hf(tmp_path / "hf").config.max_position_embeddings == length
        shutil.rmtree(tmp_path / "meta")
        shutil.rmtree(tmp_path / "hf")


def test_the_command_line_converts_both_ways(small, tmp_path):
    commands = {"from_hf": convert.from_hf, "to_hf": convert.to_hf}
    cli.run(commands, "from_hf", ["from_hf", str(small / "hf"), str(tmp_path / "meta")])
    cli.run(commands, "from_hf", ["to_hf", str(tmp_path / "meta"), str(tmp_path / "hf")])
    for path in (small / "hf").iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(SystemExit, match="error: .*hf exists; give the name of a new folder"):
        cli.run(commands, "from_hf", ["to_hf", str(tmp_path / "meta"), str(tmp_path / "hf")])


# -----------------------------------------------------------------------------
# What a user can get wrong


HEAD = "lm_head.weight"


def damage_index(folder):
    index = json.loads((folder / convert.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00002.safetensors"
    (folder / convert.INDEX).write_text(json.dumps(index))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def change(folder, edit):
    path = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("size, damage, said", [
    ("5GB", lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    ("5GB", lambda f: (f / "config.json").write_text("{"), "config.json: damaged"),
    ("5GB", lambda f: (f / "config.json").write_text("[]"), "config.json: damaged.*found \\[\\]"),
    ("5GB", lambda f: (f / convert.SINGLE).unlink(), "model.safetensors: no such file"),
    ("5GB", lambda f: cut(f / convert.SINGLE), "model.safetensors: damaged"),
    ("5GB", lambda f: (f / convert.SINGLE).write_text("version https://git-lfs"), "safetensors: damaged"),
    ("40KB", lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "model-00002-of-000.*no such file"),
    ("40KB", damage_index, "model-00009-of-00002.safetensors: no such file"),
    ("40KB", lambda f: (f / convert.INDEX).write_text("{"), "index.json: damaged"),
    ("40KB", lambda f: (f / convert.INDEX).write_text("{}"), "index.json: found no weight_map"),
    ("5GB", lambda f: change(f, lambda t: t.pop("model.norm.weight")),
     "1 tensors.*model.norm.weight is missing, expected \\[64\\]"),
    ("5GB", lambda f: change(f, lambda t: t.update({"model.norm.bias": torch.ones(64)})),
     "model.norm.bias is \\[64\\], expected absent"),
    ("5GB", lambda f: change(f, lambda t: t.update({HEAD: torch.ones(104, 32)})),
     "lm_head.weight is \\[104, 32\\], expected \\[104, 64\\]"),
    ("5GB", lambda f: change(f, lambda t: t.update({HEAD: torch.ones(104, 64, dtype=torch.int8)})),
     "lm_head.weight is torch.int8"),
    ("5GB", lambda f: change(f, lambda t: t.pop(HEAD)), "lm_head.weight is missing"),
    ("5GB", lambda f: edit_config(f, num_hidden_layers=1), "model.layers.1.*expected absent"),
    ("5GB", lambda f: edit_config(f, num_hidden_layers=3), "model.layers.2.*is missing"),
    ("5GB", lambda f: edit_config(f, tie_word_embeddings=True), "lm_head.weight differs"),
])
def test_a_damaged_hugging_face_folder_is_named_in_one_line(size, damage, said, tmp_path):
    save_hf(tmp_path / "hf", max_shard_size=size)
    damage(tmp_path / "hf")
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        convert.from_hf(tmp_path / "hf", tmp_path / "meta")
    assert "\n" not in str(caught.value) and str(tmp_path / "hf") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_old_files_with_rotary_buffers_convert(tmp_path):
    save_hf(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change(tmp_path / "b", lambda t: t.update(buffer))
    for name in "ab":
        convert.from_hf(tmp_path / name, tmp_path / f"{name}.meta")
    assert weights(tmp_path / "a.meta") == weights(tmp_path / "b.meta")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tokenizer, tmp_path):
    write_checkpoint(tmp_path / "meta", random_model(**CONFIGURATIONS["mha"]), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer.model has 560 tokens, the model 104"):
        convert.to_hf(tmp_path / "meta", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


@pytest.mark.parametrize("command, source", [(convert.from_hf, "hf"), (convert.to_hf, "meta")])
def test_an_existing_folder_is_refused_and_left_alone(small, command, source, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=f"{tmp_path} exists"):
        command(small / source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("command, source, limit", [
    (convert.from_hf, "hf", 100_000), (convert.to_hf, "meta", 100_000), (convert.to_hf, "meta", 5_000)],
    ids=["from_hf", "weights", "tokenizer"])
def test_no_space_left_is_one_line_and_leaves_nothing(small, command, source, limit, tmp_path):
    """The size of files is limited where a disk's is hard to; both fail in the same write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            command(small / source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
