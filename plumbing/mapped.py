"""Tensors as files hold them: in a piece per file, memory-mapped, in Meta's order of rows or another one."""

import functools

import torch

from plumbing import parallel

FILE_BYTES = 2**35  # An 8B in float32 is one file, and 70B in bfloat16 are eight, as Meta's.


def split_dim(name):
    """The dimension along which Meta's model-parallel files split a tensor; None: each has all of it."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(("wo.weight", "w2.weight")) else 0


class Pieces:
    """A tensor as files hold it, memory-mapped: a piece in each, which follow each other along a dimension.

    order: a function of rows and the number of heads they belong to, which brings them into Meta's order,
    where files have another one; heads: how many heads the tensor has.
    """

    def __init__(self, name, tensors, order=None, heads=1):
        dim = split_dim(name)
        self.tensors = tensors[:1] if dim is None else tensors  # Each file has all of a norm.
        self.dim = dim or 0
        self.order = order
        self.heads = heads

    @classmethod
    def of(cls, name, tensor):
        """A whole tensor as the only piece; Pieces as they are."""
        return tensor if isinstance(tensor, cls) else cls(name, [tensor])

    @property
    def shape(self):
        sizes = list(self.tensors[0].shape)
        sizes[self.dim] *= len(self.tensors)
        return sizes

    @property
    def dtype(self):
        """Of several types, the one that holds all of their values."""
        return functools.reduce(torch.promote_types, [tensor.dtype for tensor in self.tensors])

    def whole(self):
        """The whole tensor: of a single file it is the piece itself."""
        return self.part([0] * len(self.shape), self.shape)

    def part(self, offsets, sizes):
        """The part that begins at offsets and has these sizes.

        Nothing else is read but the rest of any head that it cuts.
        """
        begin, rows = offsets[0], sizes[0]
        head = self.shape[0] // self.heads if self.order else 1
        first = begin // head * head
        last = -(-(begin + rows) // head) * head  # rounded up
        found = self.read([first, *offsets[1:]], [last - first, *sizes[1:]])
        if self.order and len(found):
            found = self.order(found, len(found) // head)
        return found if len(found) == rows else found[begin - first:begin - first + rows]

    def read(self, offsets, sizes):
        """A part in the files' own order."""
        parts = []
        at = 0
        for tensor in self.tensors:  # The next one begins at `at`.
            starts, counts = list(offsets), list(sizes)
            starts[self.dim] = max(offsets[self.dim] - at, 0)
            counts[self.dim] = min(offsets[self.dim] + sizes[self.dim] - at, tensor.size(self.dim))
            counts[self.dim] -= starts[self.dim]
            at += tensor.size(self.dim)
            if counts[self.dim] > 0 or len(self.tensors) == 1:
                for dim, (start, count) in enumerate(zip(starts, counts, strict=True)):
                    tensor = tensor.narrow(dim, start, count)
                parts.append(tensor)
        if not parts:
            return self.tensors[0].new_empty(sizes)
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def stored_dtype(pieces):
    """The type of open_pieces' matrices; of several, the one that holds all of their values."""
    return functools.reduce(torch.promote_types,
                            {parts.dtype for parts in pieces.values() if len(parts.shape) > 1})


def pop_pieces(pieces, tied):
    """Yields (name, Pieces) of open_pieces' pieces, one at a time; a tied output not at all.

    They leave the dictionary, so that a file's map stays only as long as its tensors are used.
    """
    if tied:
        del pieces["output.weight"]
    for name in list(pieces):
        yield name, pieces.pop(name)


def whole_tensors(pieces, tied):
    """As pop_pieces, with whole tensors."""
    return ((name, parts.whole()) for name, parts in pop_pieces(pieces, tied))


def number_of_files(model, dtype):
    """Into how many consolidated.NN.pth a model's weights go, split as Meta splits them; see FILE_BYTES."""
    args = model.args
    needed = sum(p.numel() for p in model.parameters() if p.requires_grad) * dtype.itemsize / FILE_BYTES
    number = 1
    while needed > number and not any(size % (2 * number) for size in (
            args.vocab_size, args.dim, args.hidden_dim, args.n_kv_heads)):
        number *= 2
    return number


def weights_of_files(model, dtype):
    """Yields name -> tensor of what is trained, for one file of weights after the other.

    Every rank takes part, as sharded weights are gathered one at a time; the first gets them, on the CPU.
    """
    number = number_of_files(model, dtype)
    is_master = parallel.rank_and_size()[0] == 0
    for i in range(number):
        state = {}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            tensor = parallel.whole(p.detach())
            if not is_master:
                continue
            dim = split_dim(name)
            if dim is not None and number > 1:  # torch.save would write all that a view is a view of.
                tensor = tensor.chunk(number, dim)[i].clone()
            state[name] = tensor.to("cpu", dtype)
        if model.args.tie_word_embeddings and "tok_embeddings.weight" in state:
            state["output.weight"] = state["tok_embeddings.weight"]
        yield state
