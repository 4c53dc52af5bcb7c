"""Multiple choice as it is published: HellaSwag, ARC, PIQA, WinoGrande, MMLU, or plain questions."""

import json
import os
import random
import re
from dataclasses import dataclass

from plumbing.json_stream import json_values
from plumbing.text_files import check_file, open_text

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXPECTED = ("a row of HellaSwag, ARC, PIQA, WinoGrande or MMLU, or question, choices (a list of texts) and "
            "answer (the index of the right one)")


@dataclass
class Question:
    """What stands before each ending, mostly the same, the endings, and the index of the right one."""
    contexts: list[str]
    endings: list[str]
    answer: int


def read_questions(path):
    """The questions of a file of JSON objects; ValueError names the file and the row."""
    path = os.fspath(path)
    check_file(path, "a .jsonl file of questions")
    questions = []
    with open_text(path) as file:
        try:
            for row in json_values(file):
                questions.append(question_of(row))
        except (ValueError, RecursionError) as error:
            found = "no UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{path}, row {len(questions) + 1}: {found}; expected {EXPECTED}") from None
    if not questions:
        raise ValueError(f"{path}: found nothing; expected {EXPECTED}")
    return questions


def question_of(row):
    """The Question of a row. Prompts are those of EleutherAI's lm-eval; ValueError says what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"found {json.dumps(row):.40}")
    keys = row.keys()
    if keys >= {"goal", "sol1", "sol2", "label"}:  # PIQA
        return asked(row["goal"], [row["sol1"], row["sol2"]], index_of(row["label"], 2))
    if keys >= {"sentence", "option1", "option2", "answer"}:  # WinoGrande
        return filled(row)
    if keys >= {"endings", "label"} and keys & {"ctx", "ctx_a"}:  # HellaSwag
        return continued(row)
    if isinstance(row.get("question"), dict):  # ARC, as the Allen Institute publishes it
        options = row["question"].get("choices") or []
        options = {key: [option.get(key) for option in options] for key in ("text", "label")}
        row = {**row, "question": row["question"].get("stem"), "choices": options}
    if not row.keys() >= {"question", "choices"} or not keys & {"answer", "answerKey", "label"}:
        raise ValueError(f"found the fields {', '.join(row) or 'of no name'}")
    question = row["question"]
    options = row["choices"]
    names = None
    if isinstance(options, dict):  # ARC
        names = options.get("label")
        options = options.get("text")
    answer = next(row[key] for key in ("answerKey", "answer", "label") if key in row)
    if "subject" in keys:  # MMLU
        return lettered(question, options, index_of(answer, len(texts(options))))
    return asked(question, options, index_of(answer, len(texts(options)), names))


def index_of(answer, count, names=None):
    """The index that an answer means: a number, or a name among those of the choices, such as B or 2."""
    names = names or list(LETTERS[:count])
    if str(answer) in map(str, names):
        return list(map(str, names)).index(str(answer))
    index = int(answer) if isinstance(answer, int) or str(answer).isdecimal() else -1
    if isinstance(answer, bool) or not 0 <= index < count:
        raise ValueError(f"found the answer {answer!r:.40} to {count} choices")
    return index


def texts(options):
    """A list of texts, of which there are two at least; ValueError where it isn't one."""
    fits = isinstance(options, list) and len(options) > 1
    if not fits or not all(isinstance(option, str) and option.strip() for option in options):
        raise ValueError(f"found the choices {json.dumps(options):.60}")
    return options


def asked(question, options, answer):
    [question] = texts([question, "."])[:1]
    endings = [f" {option}" for option in texts(options)]
    return Question([f"Question: {question}\nAnswer:"] * len(endings), endings, answer)


def lettered(question, options, answer):
    """MMLU's way: the choices stand in the context, and their letters are the endings."""
    listed = [f"{letter}. {option}\n" for letter, option in zip(LETTERS, texts(options), strict=False)]
    [question] = texts([question, "."])[:1]
    context = f"{question.strip()}\n{''.join(listed)}Answer:"
    return Question([context] * len(listed), [f" {letter}" for letter in LETTERS[:len(listed)]], answer)


def filled(row):
    """WinoGrande's way: the choices fill a gap, and what follows the gap is the ending of both."""
    options = texts([row["option1"], row["option2"]])
    [sentence] = texts([row["sentence"], "."])[:1]
    before, gap, after = sentence.partition("_")
    if not gap or not after.strip():
        raise ValueError(f"found the sentence {sentence!r:.60} without a gap _ and a text behind it")
    return Question([before + option for option in options], [f" {after.strip()}"] * 2,
                    index_of(row["answer"], 2, ["1", "2"]))


def continued(row):
    """HellaSwag's way: an activity, and a text that goes on."""
    context = row.get("ctx")
    if "ctx_a" in row:
        context = f"{row['ctx_a']} {(row.get('ctx_b') or '').capitalize()}"
    [context] = texts([context, "."])[:1]
    if row.get("activity_label"):
        context = f"{row['activity_label']}: {context}"
    endings = [f" {cleaned(ending)}" for ending in texts(row["endings"])]
    return Question([cleaned(context)] * len(endings), endings, index_of(row["label"], len(endings)))


def cleaned(text):
    """A text without WikiHow's marks, such as [title]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def shots_before(questions, number, shots, seed):
    """Some other questions with their answers, as text to stand before a question; "" for none."""
    others = range(len(questions) - 1)
    drawn = random.Random(f"{seed} {number}").sample(others, min(shots, len(others)))
    chosen = [questions[i + (i >= number)] for i in drawn]
    return "".join(f"{one.contexts[one.answer]}{one.endings[one.answer]}\n\n" for one in chosen)
