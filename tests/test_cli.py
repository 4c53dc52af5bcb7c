"""The command line: text stays text, and nothing runs on a flag that does not fit."""

import pytest

import cli


@pytest.fixture
def command():
    calls = []

    def sample(*, prompt: str | None = None, n: int = 3, top: float = 0.9, shuffle: bool = False,
               betas: tuple[float, float] = (0.9, 0.95)):
        """Samples."""
        calls.append((prompt, n, top, shuffle, betas))
    return sample, calls


@pytest.mark.parametrize("text", ["Hello, world", "2024", "[1]", "-", "None", "", "a=b", "'quoted'", "-5"])
def test_text_flags_stay_text(command, text):
    sample, calls = command
    cli.run({"sample": sample}, "sample", ["--prompt", text])
    assert calls[0][0] == text


def test_values_become_what_the_annotations_say(command):
    sample, calls = command
    cli.run({"sample": sample}, "sample", ["sample", "--n=7", "--top", "1", "--shuffle", "--betas", "0.8,0.9"])
    cli.run({"sample": sample}, "sample", ["--noshuffle"])
    assert calls == [(None, 7, 1.0, True, (0.8, 0.9)), (None, 3, 0.9, False, (0.9, 0.95))]


@pytest.mark.parametrize("words, said", [
    (["--bad", "3"], "unknown flag --bad"), (["--n", "x"], "--n x: expected int"), (["hello"], "unexpected word"),
    (["--prompt"], "--prompt needs a value"), (["--n", "1", "--n", "2"], "given twice"),
    (["--shuffle=maybe"], "expected bool"), (["--betas", "1"], "--betas 1: expected tuple"),
])
def test_a_word_that_does_not_fit_is_one_line_and_nothing_runs(command, words, said):
    sample, calls = command
    with pytest.raises(SystemExit) as stop:
        cli.run({"sample": sample}, "sample", words)
    assert said in str(stop.value.code) and "\n" not in str(stop.value.code)
    assert not calls


def test_a_users_error_is_one_line():
    def fail():
        raise ValueError("found 3, expected 4")
    with pytest.raises(SystemExit, match="error: found 3, expected 4"):
        cli.run({"fail": fail}, "fail", [])
