"""Windows of whole dialogs: where a shard's documents lie, and how windows are packed with them.

A window that begins within a dialog would teach answers without their questions.
"""

from typing import NamedTuple

import numpy as np

from plumbing import files


def find_documents(path, bos_id=None, block=2**22):
    """Where the documents of a shard lie and what of them is learned, as arrays with an entry for each.

    The number of its first token; its length; how many tokens into it the first target comes, its length if
    there is none; whether any of it is masked. A document's first token, which nothing foretells, counts as
    neither target nor masked. bos_id: as in files.split_marks. block: tokens that are read at once.
    """
    header = files.read_header(path)
    nothing = np.empty(0, dtype=np.int64)
    begins, targets, masks = [nothing], [nothing], [nothing]

    def run_begins(flags):
        return np.flatnonzero(flags & np.diff(flags, prepend=False))

    for offset in range(0, header.num_tokens, block):
        stored = files.read_tokens(path, offset, block)
        _, is_target, starts = files.split_marks(stored, header.version, bos_id)
        starts[0] |= offset == 0  # whatever a file begins with
        begins.append(offset + np.flatnonzero(starts))
        # Where runs of targets and of masked tokens begin: the first one of a document begins a run.
        targets.append(offset + run_begins(is_target & ~starts))
        masks.append(offset + run_begins(~is_target & ~starts))
    begins = np.concatenate(begins)
    ends = np.append(begins[1:], header.num_tokens)
    first_target, first_mask = (
        np.append(found, header.num_tokens)[np.searchsorted(found, begins)]
        for found in map(np.concatenate, (targets, masks)))
    return begins, ends - begins, np.minimum(first_target, ends) - begins, first_mask < ends


class NoTargetError(ValueError):
    """Token files hold dialogs, but no answer that could be learned."""


class Dialogs(NamedTuple):
    """What the windows of a shard with masked targets hold: segments, one after the other."""
    begins: np.ndarray  # the first token of each segment
    lengths: np.ndarray  # in tokens
    windows: np.ndarray  # the number of each window's first segment, and at last how many segments there are
    num_documents: int
    num_cut: int  # dialogs that are longer than a window
    num_dropped: int  # documents of which no window holds a target

    def segments(self, window):
        """(first token, length) of each segment in a window."""
        held = slice(self.windows[window], self.windows[window + 1])
        return zip(self.begins[held].tolist(), self.lengths[held].tolist(), strict=True)


def pack_dialogs(path, T, bos_id=None):
    """Packs a shard's dialogs into windows of T + 1 tokens; returns Dialogs, or None if nothing is masked.

    None, too, where it can't be known where documents begin: before version 9 without a bos_id.

    A dialog is one segment, cut at its end if it is longer than a window, and none if no target is left of
    it. A document without masks may be several, each of which begins with the last token of the one before.
    Segments fill a window, in order, until one doesn't fit; the rest is padding.
    """
    version = files.read_header(path).version
    has_marks = version == files.MARKING_VERSION or (version == files.MASKING_VERSION and bos_id is not None)
    if not has_marks:
        return None
    begins, lengths, first_targets, is_dialog = find_documents(path, bos_id)
    if not is_dialog.any():
        return None
    has_target = first_targets < np.minimum(lengths, T + 1)
    is_cut = is_dialog & has_target & (lengths > T + 1)
    num_segments = np.where(is_dialog, 1, -(-(lengths - 1) // T)) * has_target  # -(-a // b) rounds up
    first_segments = num_segments.cumsum() - num_segments
    segment = np.arange(num_segments.sum()) - np.repeat(first_segments, num_segments)  # within its document
    begins = np.repeat(begins, num_segments) + segment * T
    lengths = np.minimum(np.repeat(lengths, num_segments) - segment * T, T + 1)
    windows = []
    room = 0  # in the window that is being filled
    for i, length in enumerate(lengths.tolist()):
        if length > room:
            windows.append(i)
            room = T + 1
        room -= length
    windows.append(len(lengths))
    return Dialogs(begins, lengths, np.array(windows), len(is_dialog), is_cut.sum(), (~has_target).sum())


def remark_on(pattern, headers, dialogs, T):
    """One line on what windows of shards cut, leave out and pad; "" where they don't.

    headers, dialogs: of each shard, what read_header and pack_dialogs have returned.
    """
    packed = [each for each in dialogs if each]
    num_tokens = [header.num_tokens for header in headers]
    if not packed and max(num_tokens) <= T:
        return (f"{pattern}: {sum(num_tokens)} tokens in {len(headers)} files, each padded to T + 1 = "
                f"{T + 1}")
    if not packed:
        return ""
    num_documents = sum(each.num_documents for each in packed)
    num_cut = sum(each.num_cut for each in packed)
    num_dropped = sum(each.num_dropped for each in packed)
    held = sum(int(each.lengths.sum()) for each in packed)
    room = sum(len(each.windows) - 1 for each in packed) * (T + 1)
    return (f"{pattern}: of {num_documents:,} documents {num_cut:,} are cut at T + 1 = {T + 1} tokens and "
            f"{num_dropped:,} have no target left; {1 - held / room:.0%} of the windows is padding")
