"""What is said of your own texts: what of them is left out, how large the splits are, what suits them."""

import os
import re

from plumbing import files
from plumbing.dialogs import find_documents


def print_seen(seen, special):
    """Says what of the documents was left out, and which special tokens their texts spell."""
    if seen["unlearned"]:
        print(f"Left out: chats without an assistant's turn to learn: {seen['unlearned']:,}")
    if seen["tools"]:
        print(f"Not read: the definitions of tools of {seen['tools']:,} chats; only their calls are")
    if seen["empty"]:
        print(f"Left out: documents without text: {seen['empty']:,}")
    if seen["spelled"]:
        how = "tokens" if special else "characters; --special reads them as tokens"
        print(f"{seen['spelling']:,} documents spell special tokens such as <|eot_id|>, {seen['spelled']:,} "
              f"in all, encoded as {how}; in chats always as characters")


def print_splits(data_dir, val_fraction):
    """Says how large the splits are, and which --seq_len and --val_fraction suit them."""
    manifest = files.read_manifest(data_dir)["files"]
    sizes = []
    windows = []  # the most tokens that a file of a split has
    longest = 0  # in tokens, of the dialogs and prompts
    documents = {}
    for split in "val", "train":
        names = [name for name in manifest if re.fullmatch(split + r"(_\d\d\d)?\.bin", name)]
        documents[split] = sum(manifest[name]["stories"] for name in names)
        tokens = sum(manifest[name]["tokens"] for name in names)
        windows.append(max(manifest[name]["tokens"] for name in names))
        sizes.append(f"{split}: documents {documents[split]:,}, tokens {tokens:,}")
        for name in names:
            if manifest[name]["version"] == files.MARKING_VERSION:
                _, lengths, _, is_masked = find_documents(os.path.join(data_dir, name))
                longest = max(longest, lengths[is_masked].max(initial=0))
    if longest:
        hint = f"--seq_len {longest - 1} or more cuts no chat"
    else:
        hint = f"a longer --seq_len than {min(windows) - 1} leaves a split without a full window"
    print(f"{'; '.join(sizes)}; {hint}")
    total = sum(documents.values())
    larger = min(0.5, max(0.1, round(10 / total, 1)))
    if documents["val"] < 10 <= documents["train"] and val_fraction < larger:
        print(f"Validation is small; --val_fraction {larger} gives it about {larger * total:.0f} documents")
