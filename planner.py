"""What training takes of GPUs and of their network, by arithmetic: bench.py's commands memory and plan.

Tensors are fakes here, which have a size only. tests/test_planner.py holds the numbers against what torch
counts while it trains under a fake process group.
"""

import dataclasses
import functools
import math
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llama31 import PRESETS, ModelArgs, Transformer
from plumbing import fast, lora
from plumbing.cli import expect, expect_at_least

# -----------------------------------------------------------------------------
# What one process holds without the others

def args_of(preset):
    """A preset's shape; ValueError if there is none of that name."""
    expect(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    return ModelArgs(**PRESETS[preset])


FULL = dict(param_dtype="float32", lora_rank=0, quantize=None)  # train's default of what is trained, and how


def prepared(args, form):
    """The model on the meta device in a form such as FULL, of weights that are stored in bfloat16."""
    model = Transformer.on_meta(args)
    lora.prepare(model, torch.bfloat16, form["param_dtype"], form["lora_rank"], None, form["quantize"], "")
    return model


def parameters_of(args, form):
    """(those of a block, those around the blocks) of a model in a form, on the meta device."""
    model = prepared(dataclasses.replace(args, n_layers=1), form)
    outer = [*model.tok_embeddings.parameters(), *model.norm.parameters()]
    outer += [] if args.tie_word_embeddings else model.output.parameters()
    return list(model.layers[0].parameters()), outer


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made: those that live now, and the most so far.

    others: tensors that were there before, whose views are none of them.
    """

    def __init__(self, others):
        super().__init__()
        self.now = 0
        self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def count(self, storage):
        if storage._cdata not in self.known:  # Several tensors may be views of one storage.
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, key, num_bytes):
        self.known.remove(key)
        self.now -= num_bytes


def fake_weights(model, dtype=None):
    """Gives a model on the meta device fakes as weights; dtype None: of the types that it has."""
    state = {name: torch.empty(p.shape, dtype=dtype or p.dtype) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.tie()


def saved_bytes(args, batch_size, seq_len, activation_checkpointing, dtype=None, form=FULL):
    """Bytes that a forward pass keeps for the backward pass, besides the parameters.

    dtype: of the parameters; None: as form has it. The computation is in bfloat16.
    """
    # Only the gradient of the output matrix, in float32, depends on the vocabulary; two words are faster.
    left_out = 4 * args.dim * (args.vocab_size - 2) * (form["lora_rank"] == 0)
    model = prepared(dataclasses.replace(args, vocab_size=2), form)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_weights(model, dtype)
        model.activation_checkpointing = activation_checkpointing
        with LiveBytes(model.parameters()) as live:
            tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, tokens)
        return live.now - loss.nbytes + left_out


def backward_bytes(args, batch_size, seq_len, activation_checkpointing, dtype=None, form=FULL,
                   accumulates=False):
    """The most bytes that the backward pass of a block takes besides those that its forward pass kept.

    dtype: as in saved_bytes. accumulates: there are gradients to add to; else new ones are counted, too.
    """
    model = prepared(dataclasses.replace(args, n_layers=1), form)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_weights(model, dtype)
        layer = model.layers[0]
        if accumulates:
            for p in layer.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
        x = model.tok_embeddings(torch.zeros(batch_size, seq_len, dtype=torch.int64))
        x = torch.empty_like(x).requires_grad_()
        cos, sin = model.angles(torch.arange(seq_len)[None])
        if activation_checkpointing:
            layer = functools.partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)
        with LiveBytes([x, cos, sin, *model.parameters()]) as live:
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x, cos, sin)
            kept = live.now
            live.most = 0
            y.backward(torch.empty_like(y))
    return live.most - kept


def loss_bytes(args, num_tokens, fsdp=False, on_cpu=False, form=FULL):
    """Bytes that chunked_cross_entropy takes while it runs, besides the gradients that it keeps.

    These are, in bfloat16, the output matrix (which FSDP and bfloat16 weights have already) and a chunk of
    logits; then in float32 the softmax of the chunk, or one softmax beside the chunk's gradient of the
    matrix, unless it is frozen. The CPU makes both of few rows at a time, and widens the gradient to add it.
    """
    output = args.dim * args.vocab_size
    chunk_rows = max(1, min(num_tokens, fast.LOGITS_AT_ONCE // args.vocab_size))
    softmax_rows = chunk_rows
    gradient = 2 * output
    if on_cpu:
        softmax_rows = max(1, min(chunk_rows, fast.CACHED_ENTRIES // args.vocab_size))
        gradient = (2 + 4) * min(args.vocab_size, max(1, fast.CACHED_ENTRIES // args.dim)) * args.dim
    softmax = 4 * softmax_rows * args.vocab_size
    # The logits in float32 and their logarithmic softmax; and the one before, if there is one.
    softmaxes = 3 if softmax_rows < num_tokens else 2
    most = max(softmaxes * softmax, softmax + gradient * (form["lora_rank"] == 0))
    return 2 * output * (form == FULL and not fsdp) + 2 * chunk_rows * args.vocab_size + most

# -----------------------------------------------------------------------------
# Sharing


@dataclass(frozen=True)
class Sharing:
    """How GPUs share a model: each `number` of them hold one copy, of which there are `copies`."""
    number: int
    copies: int = 1

    def bytes_of(self, parameters, itemsize=None):
        """Of a rank's part of parameters: FSDP gives each the same number of rows, the last ones padded.

        itemsize: bytes of an entry; None: as the parameters have it.
        """
        return sum(math.ceil(p.size(0) / self.number) * p[0].numel() * (itemsize or p.itemsize)
                   for p in parameters)

    def gathered(self, parameters, itemsize=None):
        """Bytes of whole parameters, with the rows that pad them; 0 where nothing is shared out."""
        return self.number * self.bytes_of(parameters, itemsize) if self.number > 1 else 0


ALONE = Sharing(1)


def training_memory(args, batch_size, seq_len, sharing=ALONE, activation_checkpointing=False,
                    micro_batches=2, on_cpu=False, form=FULL):
    """Bytes of tensors that each process of training holds at its peak, with arithmetic in bfloat16.

    Of what is trained there is a weight, a gradient and AdamW's two averages: 16 bytes a parameter in
    float32. Ranks that share them have their parts of these, gather the embedding and the output for the
    whole step, and blocks, two at a time, as they come, in bfloat16 or as a frozen one is stored; they sum
    gradients in float32. The peak is that of the worst moment. Not counted are holes between tensors, which
    on the CPU take up to a fifth more, and memory inside of an operation: without AVX512, a CPU multiplies
    transposed bfloat16 matrices into a float32 copy.
    """
    return int(max(moments(args, batch_size, seq_len, sharing, activation_checkpointing, micro_batches,
                           on_cpu, form).values()))


def moments(args, batch_size, seq_len, sharing, activation_checkpointing, micro_batches, on_cpu, form):
    """name -> bytes of tensors at the moments of a step that may be its peak; see training_memory."""
    is_shared = sharing.number > 1
    is_full = form["lora_rank"] == 0  # All is trained.
    dtype = torch.bfloat16 if is_shared and form == FULL else None
    block, outer = parameters_of(args, form)
    trained_block, trained_outer = ([p for p in group if p.requires_grad] for group in (block, outer))
    parameters = outer + args.n_layers * block
    trained = trained_outer + args.n_layers * trained_block

    # Weights, averages and gradients. Those of earlier micro-batches are there before, and DDP keeps their
    # memory in any case; the others come up block by block.
    states = sharing.bytes_of(parameters) + 2 * sharing.bytes_of(trained)
    gradients = sharing.bytes_of(trained)
    accumulates = micro_batches > 1 or (sharing.copies > 1 and not is_shared)
    before = gradients if accumulates else 0
    of_blocks = 0 if accumulates else gradients - sharing.bytes_of(trained_outer)
    of_block = of_blocks / args.n_layers
    # What is gathered, and what is summed in float32.
    itemsize = 2 if is_full else None
    whole_outer, whole_block = sharing.gathered(outer, itemsize), sharing.gathered(block, itemsize)
    summed_outer, summed_block = (sharing.gathered(group, 4) for group in (trained_outer, trained_block))

    # Activations. Every further block keeps as much as the second one; of the first one's, what belongs to
    # the last norm and the loss is gone before the backward pass reaches a block.
    first, two = (saved_bytes(dataclasses.replace(args, n_layers=n), batch_size, seq_len,
                              activation_checkpointing, dtype, form) for n in (1, 2))
    of_one = two - first
    kept = first + (args.n_layers - 1) * of_one
    copies = 0
    if activation_checkpointing and (not is_shared or not is_full):
        # Autocast's copies of weights live as long as the forward pass.
        copies = 2 * args.n_layers * sum(p.numel() for p in trained_block
                                         if p.dim() > 1 and p.dtype == torch.float32)
    backward = backward_bytes(args, batch_size, seq_len, activation_checkpointing, dtype, form,
                              accumulates and not is_shared)

    # The gradient of the output matrix comes with the loss. It waits for the embedding's, to be summed with
    # it over the ranks, or to be added if they are one matrix.
    output = args.dim * args.vocab_size if is_full else 0
    of_output = output * (2 if is_shared or form["param_dtype"] == "bfloat16" else 4)
    waiting = of_output if is_shared or args.tie_word_embeddings else 0
    of_embedding = of_output * (2 if args.tie_word_embeddings else 1)
    if form["param_dtype"] == "bfloat16":
        of_embedding = (4 + 2) * output  # Rows are added up in float32.

    inner = states + before + whole_outer
    running = inner + waiting + backward  # a block's backward pass
    return {
        "gathering": states + before + 2 * (whole_outer + whole_block),
        "loss": inner + kept + copies + loss_bytes(args, batch_size * seq_len, is_shared, on_cpu, form),
        "turn": inner + kept + whole_block + (of_output if is_shared else 0),
        # The weights of the next block arrive, and the gradients of the one before are summed.
        "last block": running + args.n_layers * of_one + 2 * whole_block,
        "block before": running + (args.n_layers - 1) * of_one + 2 * whole_block + summed_block + of_block,
        "first block": running + of_one + whole_block + summed_block + of_blocks - of_block,
        "embedding": inner + of_blocks + summed_block + of_output + of_embedding,
        "sums": states + gradients + sharing.gathered(trained_outer, 2) + summed_outer,
    }


def sent_bytes(args, sharing, micro_batches=1, form=FULL, machine=8):
    """(bytes that each GPU sends in a step, those of them that leave its machine of so many GPUs).

    Collectives send what rings send, the least: of whole data of S bytes over N ranks, each rank sends
    S (N - 1) / N to gather or to sum and scatter it, and twice as much where all get the sum. Rings enter
    each machine once, spread over its GPUs' links. A few numbers, such as the loss, are left out.
    """
    block, outer = parameters_of(args, form)
    blocks = args.n_layers * block
    itemsize = 2 if form["lora_rank"] == 0 else None
    trained = [p for p in outer + blocks if p.requires_grad]

    def leaving(size, number, stride):
        """Per GPU, what leaves a machine in a ring of so many ranks, each `stride` from the next."""
        together = max(1, machine // stride)  # ranks of the ring that are in one machine
        machines = max(1, number // together)
        return size * (machines - 1) / machines / together

    sent = away = 0
    if sharing.number > 1:
        # All are gathered for the forward pass, and the blocks again for the backward pass.
        size = (sharing.gathered(outer + blocks, itemsize) + sharing.gathered(blocks, itemsize)
                + sharing.gathered(trained, 4)) * micro_batches
        sent += size * (sharing.number - 1) / sharing.number
        away += leaving(size, sharing.number, 1)
    if sharing.copies > 1:
        size = micro_batches * sharing.bytes_of(trained, 4)
        if sharing.number == 1:  # DDP sums the gradients as they are stored, after the last micro-batch.
            size = sum(p.nbytes for p in trained)
        sent += 2 * size * (sharing.copies - 1) / sharing.copies
        away += 2 * leaving(size, sharing.copies, sharing.number)
    return round(sent), round(away)

# -----------------------------------------------------------------------------
# Commands


def memory(*, batch_size: int = 1, seq_len: int = 2048):
    """Prints as a Markdown table what training takes of each GPU, in GiB, and where that fits.

    A cell has what it takes, what with --activation_checkpointing, and the smallest GPU that has that.

    Args:
        batch_size: windows that a GPU computes at once
        seq_len: tokens of a window
    """
    ways = {"one, or eight with DDP": Sharing(1, 8), "eight with --fsdp": Sharing(8)}
    forms = {"all in float32": FULL, "--param_dtype bfloat16": FULL | dict(param_dtype="bfloat16"),
             "--lora_rank 16": FULL | dict(lora_rank=16),
             "--lora_rank 16 --quantize int8": FULL | dict(lora_rank=16, quantize="int8")}
    print(f"| model | GPUs, {batch_size} x {seq_len:,} tokens each | {' | '.join(forms)} |")
    print(f"|---|---|{'---|' * len(forms)}")
    for name in ("llama3.2-1b", "llama3.2-3b", "llama3.1-8b", "llama3.1-70b"):
        for way, sharing in ways.items():
            cells = []
            for form in forms.values():
                plain, recomputed = (training_memory(
                    args_of(name), batch_size, seq_len, sharing, recomputes, form=form)
                    / 2**30 for recomputes in (False, True))
                rooms = [f"{room} GB" for room in (24, 48, 80) if fits(recomputed, room)]
                cells.append(f"{plain:,.0f}, {recomputed:,.0f}: {rooms[0] if rooms else 'none'}")
            print(f"| {name} | {way} | {' | '.join(cells)} |")


@dataclass
class Way:
    """A row of plan's table."""
    sharing: Sharing
    recomputes: bool  # blocks, as --activation_checkpointing does
    gibibytes: float
    sent: int  # bytes that a GPU sends per step, to wherever
    away: int  # bytes of these that leave its machine

    @classmethod
    def of(cls, args, batch_size, seq_len, sharing, recomputes, micro_batches, form, machine):
        size = training_memory(args, batch_size, seq_len, sharing, recomputes, micro_batches, form=form)
        sent, away = sent_bytes(args, sharing, micro_batches, form, machine)
        return cls(sharing, recomputes, size / 2**30, sent, away)

    @property
    def flags(self):
        number = f" {self.sharing.number}" if self.sharing.copies > 1 else ""
        words = {f"--fsdp{number}": self.sharing.number > 1, "--activation_checkpointing": self.recomputes}
        return " ".join(word for word, is_set in words.items() if is_set) or "none"


def best_of(ways):
    """The way that sends the least between machines, and in all; None of none.

    A twentieth more is as good. Of equal ones it is the one that computes no block twice, then the one whose
    copies are shared by the fewest, as they wait for each other.
    """
    for measure in ("away", "sent"):
        least = min((getattr(way, measure) for way in ways), default=0)
        ways = [way for way in ways if getattr(way, measure) <= 1.05 * least]
    return min(ways, key=lambda way: (way.recomputes, way.sharing.number), default=None)


def fits(gibibytes, room):
    """Whether tensors fit a GPU of so many GB; CUDA and holes between tensors take some."""
    return gibibytes < 0.92 * room


def plan(*, preset: str, gpus: int, gpu_memory: float = 80, machine: int = 8, batch_size: int = 1,
         seq_len: int = 8192, total_batch_tokens: int | None = None, param_dtype: str = "float32",
         lora_rank: int = 0, quantize: str | None = None):
    """Prints for each way of sharing a model among GPUs what it takes of each, and names the best.

    That is one that fits and sends the least; see best_of.

    Args:
        preset: a shape such as llama3.1-70b
        gpus: how many there are
        gpu_memory: GiB of each, by which GPUs are named: 80 of an H100
        machine: GPUs of a machine, between which data travels fast
        batch_size: windows that a GPU computes at once
        seq_len: tokens of a window
        total_batch_tokens: tokens per step of all GPUs; None: one micro-batch each
        param_dtype: float32, or bfloat16, in which weights, gradients and averages are kept
        lora_rank: rank of adapters on frozen weights; 0: everything is trained
        quantize: int8: the frozen weights in 8 bits
    """
    args = args_of(preset)
    expect_at_least(1, gpus=gpus, machine=machine, batch_size=batch_size, seq_len=seq_len)
    expect(gpu_memory > 0, "gpu_memory", gpu_memory, "a number above 0")
    expect(gpus <= machine or gpus % machine == 0, "gpus", gpus, f"a multiple of --machine {machine}")
    tokens = gpus * batch_size * seq_len
    expect_at_least(0, lora_rank=lora_rank)
    total = tokens if total_batch_tokens is None else total_batch_tokens
    expect(total > 0 and total % tokens == 0, "total_batch_tokens", total, f"a multiple of {tokens:,}, the "
           "tokens of a micro-batch on all GPUs")
    form = dict(param_dtype=param_dtype, lora_rank=lora_rank, quantize=quantize)
    micro_batches = total // tokens
    # Copies that end within a machine would share its links with others.
    numbers = [1, *(n for n in range(machine, gpus, machine) if gpus % n == 0), gpus]
    sharings = [Sharing(number, gpus // number) for number in dict.fromkeys(numbers)]
    ways = [Way.of(args, batch_size, seq_len, sharing, recomputes, micro_batches, form, machine)
            for sharing in sharings for recomputes in (False, True)]
    best = best_of([way for way in ways if fits(way.gibibytes, gpu_memory)])
    kind = param_dtype
    if lora_rank:
        kind = f"adapters of rank {lora_rank}" + (" on int8" if quantize else "")
    print(f"{preset}, {kind}, on {gpus} x {gpu_memory:g} GB, {machine} GPUs in a machine; {total:,} tokens "
          f"per step, {micro_batches} x {batch_size} x {seq_len:,} on each GPU\n")
    print("| flags of train | GiB of each GPU | GB that it sends per step | between machines | |")
    print("|---|---|---|---|---|")
    for way in ways:
        remark = "best" if way is best else "" if fits(way.gibibytes, gpu_memory) else "doesn't fit"
        print(f"| {way.flags} | {way.gibibytes:,.1f} | {way.sent / 1e9:,.1f} | {way.away / 1e9:,.1f} | "
              f"{remark} |")
    if best is None:
        print("\nNothing fits: take more or larger GPUs, a smaller batch, shorter windows, --param_dtype "
              "bfloat16 or --lora_rank")
