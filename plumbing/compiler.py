"""A C++ file as a library for the processor at hand, kept in the user's cache folder for the next process.

The name of a library there is the SHA-256 of all that makes it: its source with its constants, the command,
and the macros that the compiler defines, which name its version and what the processor can do. Its last 32
bytes are the SHA-256 of those before, so that a damaged one is compiled anew: the loader would crash on it.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from plumbing.files import complete
from plumbing.headers import source_of

DIGEST_BYTES = hashlib.sha256().digest_size
# -fassociative-math and what it needs lets sums be taken in any order, as vectors take them.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi", "-fno-math-errno",
         "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")


def words_of(variable):
    """The words of an environment variable, as a shell splits them; OSError where a quote is not closed."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise OSError(f"{variable} is {text}: {error}") from None


def find_compiler():
    """The words that begin a C++ compiler's command, CXX or g++; OSError if there is none."""
    text = os.environ.get("CXX", "").strip() or "g++"
    words = [text] if shutil.which(text) else words_of("CXX") or [text]  # A path may have spaces.
    if shutil.which(words[0]) is None:
        raise OSError(f"no C++ compiler found ({words[0]}, or CXX)")
    return words


def run_compiler(command, source, name):
    """What the compiler prints; OSError with its first error if it fails on the file of that name."""
    done = subprocess.run(command, input=source, encoding="utf-8", errors="replace", capture_output=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise OSError(f"{shlex.join(find_compiler())} can't compile {name}: {reason.strip()}")
    return done.stdout


def cache_folder():
    """The user's folder for libraries; OSError where there is none, or where others can put code into it."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        raise OSError("found no home folder and no XDG_CACHE_HOME")
    folder = Path(home, "llama31")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_others(folder)
    return folder


def refuse_others(path):
    """Raises PermissionError where another user than this one could have written what lies at a path."""
    status = os.stat(path)
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise PermissionError(f"{path}: it is another user's, or others can write to it")


def load_kept(path):
    """The library that keep wrote to a path; None if absent or damaged, OSError if it can't be loaded."""
    if not path.exists():
        return None
    refuse_others(path)
    data = path.read_bytes()
    if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
        return None
    return ctypes.CDLL(os.fspath(path))


def keep(library, path):
    """Copies a library to a path, where it appears at once, whole, whatever other processes do there."""
    data = Path(library).read_bytes()
    unique = f"{path}.{uuid.uuid4().hex}"
    with complete(unique) as file:
        file.write(data + hashlib.sha256(data).digest())
    os.chmod(unique, 0o700)  # whatever the user's mask
    os.replace(unique, path)


def describe(error):
    """An OSError as a user reads it: the file, and what is wrong with it."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def compile_library(path, **constants):
    """The ctypes library of a C++ file, in which each constant is a macro; OSError where it can't be made.

    CXXFLAGS, as everywhere, are the user's further flags, such as -march=x86-64-v3 for an older processor.
    Lines on standard error say when it compiles, which takes seconds, and why the result is not kept.
    """
    compiler = find_compiler()
    source = "".join(f"#define {name} {value}\n" for name, value in constants.items()) + source_of(path)
    command = [*compiler, "-x", "c++", "-", *FLAGS, *words_of("CXXFLAGS")]
    macros = run_compiler([*command, "-dM", "-E"], "", path.name)
    made_of = "\0".join([*command, macros, source])
    key = hashlib.sha256(made_of.encode(errors="surrogateescape")).hexdigest()
    try:
        kept = cache_folder() / f"{key}.so"
        if library := load_kept(kept):
            return library
        print(f"compiling {path.name}, which takes some seconds; later starts find it in {kept.parent}",
              file=sys.stderr)
    except OSError as error:
        kept = None
        print(f"{describe(error)}; compiling {path.name} for this start alone", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        compiled = os.path.join(folder, "compiled.o")
        linked = os.path.join(folder, "linked.so")
        run_compiler([*command, "-c", "-o", compiled], source, path.name)
        # Linked without -fopenmp, the library finds the OpenMP that PyTorch has loaded.
        run_compiler([*compiler, "-shared", "-o", linked, compiled], "", path.name)
        try:
            if kept:
                keep(linked, kept)
                if library := load_kept(kept):
                    return library
        except OSError as error:
            print(f"{describe(error)}; what is compiled serves this start alone", file=sys.stderr)
        return ctypes.CDLL(linked)


class Address(ctypes.c_void_p):
    """A C function's parameter that takes a tensor as the address of its first element; None as 0."""

    @classmethod
    def from_param(cls, tensor):
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
