"""The cache of compiled libraries: found again, whole or compiled anew, where no one else can write."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import ROOT, random_llama, write_checkpoint

from llama31 import Llama
from plumbing import compiler, fast

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where libraries are kept during a test; it is made when it is needed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CXXFLAGS", raising=False)
    return tmp_path / "cache" / "llama31"


def compiled(source, capsys, answer=42):
    """What a compiled library answers, and whether standard error says that it was compiled."""
    assert compiler.compile_library(source, ANSWER=answer).answer() == answer
    return capsys.readouterr().err


def test_a_library_is_compiled_once_and_found_again(source, folder, capsys):
    assert compiled(source, capsys) == (f"compiling answer.cpp, which takes some seconds; later starts find "
                                        f"it in {folder}\n")
    assert compiled(source, capsys) == ""
    [kept] = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_a_header_beside_a_file_is_part_of_it(source, folder, capsys):
    header = source.with_name("header.h")
    header.write_text("#define TWICE(x) (2 * (x))\n")
    source.write_text('#include "header.h"\nextern "C" int answer() { return TWICE(ANSWER) - ANSWER; }\n')
    assert compiled(source, capsys) and not compiled(source, capsys)
    header.write_text("#define TWICE(x) ((x) + (x))\n")
    assert compiled(source, capsys)
    for damaged, place in ((header, "header.h:1"), (source, "answer.cpp:3")):
        text = damaged.read_text()
        damaged.write_text(text.replace("#define", "?", 1) if damaged == header else text + "?\n")
        with pytest.raises(OSError, match=f"can't compile answer.cpp: {place}"):
            compiled(source, capsys)
        damaged.write_text(text)


@pytest.mark.parametrize("change", ["source", "constant", "flags", "compiler", "processor"])
def test_whatever_makes_a_library_makes_its_name(change, source, folder, capsys, monkeypatch):
    compiled(source, capsys)
    answer = 42
    if change == "source":
        source.write_text(SOURCE + "\n")
    if change == "constant":
        answer = 43
    if change == "flags":
        monkeypatch.setenv("CXXFLAGS", "-O1")
    if change == "compiler":
        monkeypatch.setenv("CXX", "g++ -m64")
    if change == "processor":
        run = compiler.run_compiler
        monkeypatch.setattr(compiler, "run_compiler", lambda command, *rest: run(command, *rest) + (
            "#define __AVX1024__ 1\n" if "-dM" in command else ""))
    assert "compiling" in compiled(source, capsys, answer)
    assert len(list(folder.iterdir())) == 2
    assert compiled(source, capsys, answer) == ""


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:2000],
                                    lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:]])
def test_a_damaged_library_is_compiled_anew_and_replaced(damage, source, folder, capsys):
    compiled(source, capsys)
    [kept] = folder.iterdir()
    data = kept.read_bytes()
    kept.unlink()  # This process has mapped it, and must not see it shrink.
    kept.write_bytes(damage(data))
    assert "compiling" in compiled(source, capsys)
    assert compiled(source, capsys) == ""


def test_two_processes_compile_at_once(source, folder):
    code = ("import sys; from pathlib import Path; from plumbing.compiler import compile_library; "
            f"print(compile_library(Path({str(source)!r}), ANSWER=42).answer())")
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                                                      capture_output=True).stdout, range(4)))
    assert outs == ["42\n"] * 4
    assert len(list(folder.iterdir())) == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such owners")
@pytest.mark.parametrize("place", ["folder", "file"])
def test_code_that_others_could_have_written_is_not_loaded(place, source, folder, capsys):
    compiled(source, capsys)
    [kept] = folder.iterdir()
    path = folder if place == "folder" else kept
    path.chmod(0o777)
    assert compiled(source, capsys) == (f"{path}: it is another user's, or others can write to it; "
                                        "compiling answer.cpp for this start alone\n")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such owners")
def test_a_folder_of_another_user_is_not_used(source, folder, capsys, monkeypatch):
    compiled(source, capsys)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(folder).st_uid + 1)
    assert f"{folder}: it is another user's" in compiled(source, capsys)


@pytest.mark.parametrize("fault", ["a file in its place", "full", "noexec"])
def test_where_a_library_cannot_be_kept_it_serves_one_start(fault, source, folder, capsys, monkeypatch):
    if fault == "a file in its place":
        folder.parent.write_text("")
    if fault == "full":
        monkeypatch.setattr(os, "fsync", lambda file: raise_error(OSError(errno.ENOSPC, "No space left")))
    if fault == "noexec":
        load = compiler.ctypes.CDLL
        monkeypatch.setattr(compiler.ctypes, "CDLL", lambda path: raise_error(OSError(
            f"{path}: failed to map segment")) if str(folder) in path else load(path))
    for _ in range(2):
        err = compiled(source, capsys)
        assert str(folder.parent) in err and err.rstrip().endswith("this start alone")


def raise_error(error):
    raise error


@pytest.mark.parametrize("words", ["g++ -m64", "{launcher} g++", "'{spaced}'", "{spaced}"])
def test_cxx_may_have_flags_a_launcher_or_spaces(words, source, folder, tmp_path, capsys, monkeypatch):
    launcher = tmp_path / "ccache"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    spaced = tmp_path / "my compilers" / "c++"
    spaced.parent.mkdir()
    spaced.symlink_to(shutil.which("g++"))
    monkeypatch.setenv("CXX", words.format(launcher=launcher, spaced=spaced))
    assert "compiling" in compiled(source, capsys)


@pytest.mark.parametrize("cxx, fault", [
    ("'g++", "No closing quotation"), ("nosuchcompiler -O2", "nosuchcompiler")])
def test_a_cxx_that_is_no_command_is_said_and_decoding_goes_on(cxx, fault, tmp_path, capsys, monkeypatch):
    expected = random_llama()
    monkeypatch.setenv("CXX", cxx)
    llama = Llama.build(write_checkpoint(tmp_path / "ckpt", expected.model), device="cpu")
    assert llama.reader is None
    [line] = capsys.readouterr().err.splitlines()
    assert fault in line
    assert llama.generate([[1, 2]], 9, temperature=0) == expected.generate([[1, 2]], 9, temperature=0)


def test_compiling_is_the_default_and_can_be_left_out(tmp_path):
    ckpt_dir = write_checkpoint(tmp_path / "ckpt", random_llama().model)
    for compile, kind in ((None, fast.CompiledReader), (True, fast.CompiledReader), (False, type(None))):
        assert type(Llama.build(ckpt_dir, device="cpu", compile=compile).reader) is kind


@pytest.mark.parametrize("name, text", [("CXXFLAGS", '-O2 "'), ("CXX", "latin")])
def test_odd_variables_and_messages_are_one_line(name, text, tmp_path, capsys, monkeypatch):
    if text == "latin":
        compiler_path = tmp_path / "c++"
        compiler_path.write_bytes(b"#!/bin/sh\nprintf 'c++: error: d\\351faut\\n' >&2\nexit 1\n")
        compiler_path.chmod(0o755)
        text = str(compiler_path)
    monkeypatch.setenv(name, text)
    fast.compile_kernels.cache_clear()
    llama = Llama.build(write_checkpoint(tmp_path / "ckpt", random_llama().model), device="cpu")
    assert llama.reader is None and len(capsys.readouterr().err.splitlines()) == 1


def test_without_a_home_a_library_serves_one_start(source, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert compiled(source, capsys).startswith("found no home folder and no XDG_CACHE_HOME; compiling")
    assert not (tmp_path / "~").exists()
