"""params.json, Meta's description of a model, and llama31.json beside it, read strictly and written.

llama31.json has what Meta's loader doesn't take from params.json.
"""

import dataclasses
import json
import math
from pathlib import Path

from plumbing.cli import expect

OUR_PARAMS = "llama31.json"
OUR_FIELDS = ("head_dim", "rope_scale_factor", "rope_low_freq_factor", "rope_high_freq_factor",
              "rope_old_context", "tie_word_embeddings", "max_seq_len")


def expect_types(values):
    """Raises ValueError naming a dataclass's field that isn't of its type, or a number not above 0."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if value is None and field.default is None:
            continue
        if field.type is bool:
            expect(type(value) is bool, field.name, repr(value), "true or false")
        elif field.type in (int, int | None):
            is_count = type(value) is int and value > 0
            expect(is_count, field.name, repr(value), "a whole number of at least 1")
        else:
            is_positive = isinstance(value, int | float) and value is not True and 0 < value < math.inf
            expect(is_positive, field.name, repr(value), "a number above 0")


def fit_context(args, seq_len, is_new):
    """Sets max_seq_len to what a training on windows of seq_len tokens leaves; returns a remark, or "".

    A sample may be as long as its windows, or as what a checkpoint could read before.
    """
    before = args.max_seq_len
    args.max_seq_len = seq_len if is_new else max(before, seq_len)
    if is_new or seq_len <= before:
        return ""
    return (f"--seq_len {seq_len} is beyond the {before} tokens that the model is made for; it has to learn "
            "the rest")


def read_params(path, shape):
    """(shape(**fields), fields): a dataclass out of params.json and of llama31.json beside it, if there.

    FileNotFoundError, or ValueError that names the file and the field at fault.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint directory holds a params.json")
    known = [field.name for field in dataclasses.fields(shape)]
    fields = {}
    for file in (path.with_name(OUR_PARAMS), path):  # What ours has, such as head_dim, decides what fits.
        if not file.exists():  # Meta's folders have no llama31.json.
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8-sig"))
            if not isinstance(found, dict):
                raise ValueError(f"found {json.dumps(found):.40}; expected an object of fields")
            if unknown := sorted(found.keys() - known):
                raise ValueError(f"unknown field {', '.join(unknown)}; expected some of {', '.join(known)}")
            fields = found | fields
            args = shape(**fields)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: {error}: found no JSON, expected an object of fields; download it "
                             "again") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return args, fields


def write_params(folder, fields):
    """Writes params.json and llama31.json, which shares out the fields as Meta's loader takes them."""
    ours = {name: value for name, value in fields.items() if name in OUR_FIELDS}
    metas = {name: value for name, value in fields.items() if name not in OUR_FIELDS}
    for name, part in (("params.json", metas), (OUR_PARAMS, ours)):
        (folder / name).write_text(json.dumps(part, indent=2) + "\n")
