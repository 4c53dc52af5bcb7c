"""The house: how long files may be, which way imports point, how much is explained."""

import ast
import io
import tokenize

import pytest
from tiny import ROOT

# The table of DESIGN.md's layout. A file that needs more for a reason changes its number here.
BUDGETS = {
    "llama31.py": 1300,
    "tokenizer.py": 335,
    "tiny_stories.py": 408,
    "stories.py": 400,
    "reference.py": 369,  # 270, the flags it shares with sample, any heads and RoPE, what is no Llama
    "convert.py": 207,
    "evaluate.py": 190,
    "chat.py": 175,  # 140, a line of help for each of its 14 flags
    "bench.py": 429,
    "planner.py": 407,  # Out of bench.py came the memory; a plan needs the bytes sent, too.
    "peers.py": 140,
    "plumbing/fast.py": 375,
    "plumbing/narrow.py": 155,  # weights of fewer bits than the arithmetic, out of fast.py
    "plumbing/devices.py": 85,  # devices and the types of numbers that suit them, out of fast.py
    "plumbing/fast.cpp": 630,  # 620, and int8 products for each kind of processor
    "plumbing/vectors.h": 50,  # what fast.cpp and attention.cpp both need
    "plumbing/attention.py": 156,
    "plumbing/muon.py": 52,
    "plumbing/decoding.py": 259,  # one static graph a token, the sampler on a device, its limits on a CPU
    "plumbing/attention.cpp": 260,  # attention on a CPU, forward and backward
    "plumbing/checkpoint.py": 305,  # 260, and the best checkpoint, master weights
    "plumbing/params.py": 50,  # params.json and llama31.json, out of checkpoint.py
    "plumbing/torch_file.py": 68,  # files of torch.save, each tensor in its own map, out of checkpoint.py
    "plumbing/mapped.py": 140,  # tensors in pieces, out of checkpoint.py, and in part
    "plumbing/lora.py": 210,
    "plumbing/adapters.py": 107,  # adapters as PEFT's files and what these may hold, out of lora.py
    "plumbing/rounding.py": 105,  # the optimizer of bfloat16 weights, out of lora.py
    "plumbing/messages.py": 125,  # the messages of dialogs as files have them, out of tokenizer.py
    "plumbing/meta_vocabulary.py": 136,  # Meta's tokenizer.model, out of tokenizer.py
    "plumbing/tokenizer_json.py": 233,  # vocabularies of Hugging Face's folders, for tokenizer.py
    "plumbing/vocabularies.py": 140,  # a vocabulary in another layout's files, out of convert.py
    "plumbing/gguf_file.py": 213,  # llama.cpp's file: weights, what it can say of vocabularies, refusals
    "plumbing/huggingface.py": 178,
    "plumbing/config_json.py": 112,  # config.json in and out, out of huggingface.py and convert.py
    "plumbing/parallel.py": 188,  # 180, and launchers other than torchrun
    "plumbing/tensor_parallel.py": 46,  # a model that processes split, out of parallel.py
    "plumbing/scoring.py": 125,  # log-likelihoods, out of evaluate.py
    "plumbing/start.py": 90,  # flags, sources and first weights of a training, out of llama31.py
    "plumbing/resume.py": 233,  # a run's lock and record, out of run.py
    "plumbing/run.py": 245,  # 220, and five signals, the best step
    "plumbing/plot.py": 40,  # the plot of a run's losses, out of run.py
    "plumbing/files.py": 230,  # 130, and the checks and messages of shards and manifests
    "plumbing/text_files.py": 74,  # text of any encoding and JSON, out of files.py
    "plumbing/cli.py": 200,  # 110, and lists, numbered switches, checks
    "plumbing/prompts.py": 75,  # what a command is to complete or answer, out of cli.py and chat.py
    "plumbing/streams.py": 75,  # standard streams of any encoding, gone readers, out of cli.py
    "plumbing/download.py": 160,
    "plumbing/documents.py": 202,
    "plumbing/records.py": 120,  # rows of every form as records, out of documents.py
    "plumbing/json_stream.py": 85,  # JSON in blocks, out of documents.py
    "plumbing/chat_template.py": 355,  # templates, contents that can't forge tokens, where answers stand
    "plumbing/questions.py": 140,  # multiple choice as its files are published
    "plumbing/dialogs.py": 115,  # which windows a shard of dialogs has
    "plumbing/words.py": 115,  # records as tokens, out of tiny_stories.py
    "plumbing/summary.py": 48,  # what text() says of documents and splits, out of tiny_stories.py
    "plumbing/compiler.py": 144,  # a library out of C++, kept in the user's cache folder
    "plumbing/headers.py": 20,
    "plumbing/answers.py": 230,  # what sampling prints, out of llama31.py, its stopwatch, answers to rows
    "plumbing/machine.py": 175,  # what differs between operating systems, and the limits of containers
    "plumbing/workers.py": 80,  # processes that share out jobs, out of tiny_stories.py
}
SCRIPTS = {"llama31", "tiny_stories", "stories", "reference", "convert", "evaluate", "chat", "bench",
           "planner", "peers"}


def imports(path):
    """The modules that a file imports anywhere, a package's by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_file_has_a_budget_and_keeps_it():
    patterns = "*.py", "plumbing/*.py", "plumbing/*.cpp", "plumbing/*.h"
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
               for path in files if path.name != "__init__.py"}
    assert lengths.keys() <= BUDGETS.keys()
    over = {name: length for name, length in lengths.items() if length > BUDGETS[name]}
    assert not over, f"over their budgets: {over}"


def test_nothing_in_plumbing_imports_a_script():
    for path in (ROOT / "plumbing").glob("*.py"):
        assert not imports(path) & SCRIPTS, path


def test_the_reference_shares_only_the_tokenizer_and_the_command_line():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"plumbing", "importlib"}
    found = {name for name in imports(ROOT / "reference.py") if name.partition(".")[0] in ours}
    assert found == {"plumbing", "plumbing.cli", "plumbing.prompts", "plumbing.prompts.read_prompts",
                     "plumbing.prompts.say_cut", "plumbing.prompts.say_spelled",
                     "tokenizer", "tokenizer.open_tokenizer"}
    rooms = ("cli", "prompts", "files", "text_files", "streams",  # and what tokenizer.py imports
             "meta_vocabulary", "tokenizer_json", "chat_template", "messages")
    for shared in ("tokenizer.py", *(f"plumbing/{name}.py" for name in rooms)):
        assert not imports(ROOT / shared) & {"llama31", "importlib", "plumbing.fast", "plumbing.checkpoint"}


def test_llama31_explains_itself():
    """At least 14 comments for every 100 lines of code, docstrings not counted as either."""
    source = (ROOT / "llama31.py").read_text(encoding="utf-8")
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER, tokenize.ENCODING}
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    dashes = "-" * 20  # of a banner, which explains nothing
    comments = sum(token.type == tokenize.COMMENT and dashes not in token.string for token in tokens)
    code = {line for token in tokens if token.type not in silent
            for line in range(token.start[0], token.end[0] + 1)} - docstrings
    assert comments >= 0.14 * len(code), f"{comments} comments on {len(code)} lines of code"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_tests_have_short_names_and_import_no_other_test(path):
    assert not any(name.startswith("test_") for name in imports(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert len(node.name) <= 70, node.name
