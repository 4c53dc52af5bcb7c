"""The demo corpus: its size and variety, and an entropy that is really that of its stories."""

import collections
import json
import math
import os
import random
import re

import pytest

import stories
from stories import bits, distinct_stories, parse, read_grammar, tell

STORY, LISTS = GRAMMAR = read_grammar()
BOYS, GIRLS = (set(LISTS[name]) for name in ("boy", "girl"))
SAMPLE = distinct_stories(2000)
TINY_WORDS = """
girl: Ann, Uma
boy: Bob, Ed
woman: aunt
man: dad
pet: cat, owl
cat: fish, milk,
  cream
owl: mice, worms
toy: ball, top
"""
TINY = """
story:
- {name} and {name2} had a {pet}.(| // {he} gave it {treat:pet} and told {him2}.) <end>
- Every {toy}, a {toy2} and the {toy}. <kid>!
kid = {name=girl}|Nobody
end = The {pet}!|
  (Good|Bad|Odd)
  {pet}.
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The real corpus: {split: texts}, and the folder that holds it."""
    folder = tmp_path_factory.mktemp("corpus")
    stories.write(str(folder))
    return folder, read_splits(folder)


def read_splits(folder):
    names = sorted(os.listdir(folder / "TinyStories_all_data"))
    assert names == [f"data{i:02d}.json" for i in range(len(names))]
    shards = [json.loads((folder / "TinyStories_all_data" / name).read_text()) for name in names]
    assert all(record.keys() == {"story"} for shard in shards for record in shard)
    texts = [[record["story"] for record in shard] for shard in shards]
    return {"val": texts[0], "train": sum(texts[1:], [])}


def plain_words(text):
    return re.sub(r"[^\w\s]", "", text.lower()).split()


# -----------------------------------------------------------------------------
# the corpus, which takes long to write


@pytest.mark.slow
def test_the_corpus_is_large_and_no_story_occurs_twice(corpus):
    splits = corpus[1]
    texts = splits["val"] + splits["train"]
    assert len(set(texts)) == len(texts) >= 20_000 and len(splits["val"]) >= 1000
    assert sum(len(text.encode()) for text in splits["train"]) >= 5_000_000
    assert len({word for text in texts for word in plain_words(text)}) >= 600


@pytest.mark.slow
def test_no_eight_words_are_in_more_than_two_percent_of_the_stories(corpus):
    texts = sum(corpus[1].values(), [])
    counts = collections.Counter()
    for text in texts:
        words = plain_words(text)
        counts.update({hash(tuple(words[i:i + 8])) for i in range(len(words) - 7)})
    assert counts.most_common(1)[0][1] <= 0.015 * len(texts)


@pytest.mark.slow
def test_entropy_json_holds_the_bits_and_bytes_of_the_splits(corpus):
    folder, splits = corpus
    entropy = json.loads((folder / "entropy.json").read_text())
    assert entropy.keys() == splits.keys()
    for split, facts in entropy.items():
        assert facts["stories"] == len(splits[split])
        assert facts["bytes"] == sum(len(text.encode()) for text in splits[split])
        assert facts["bits_per_byte"] == pytest.approx(facts["bits"] / facts["bytes"], abs=1e-6)
        assert facts["bits_per_byte"] >= 0.4
    chains = [parse(text, GRAMMAR) for text in splits["val"]]
    assert bits(chains) == pytest.approx(entropy["val"]["bits"], abs=1e-2)
    assert entropy["train"]["bits_per_byte"] == pytest.approx(entropy["val"]["bits_per_byte"], rel=0.01)


@pytest.mark.slow
def test_train_stories_parse_too(corpus):
    for text in random.Random(0).sample(corpus[1]["train"], 300):
        parse(text, GRAMMAR)


@pytest.mark.slow
def test_every_prompt_of_the_demo_begins_a_twelfth_of_the_stories(corpus):
    texts = corpus[1]["train"]
    for opening in ("Once upon a time,", "One day,", r"\w+ and \w+ were best friends\.",
                    "On a dark and stormy night,"):
        assert sum(bool(re.match(opening, text)) for text in texts) >= len(texts) / 12


def test_two_runs_write_the_same_bytes_and_leave_nothing_beside(tmp_path):
    for run in ("a", "b", "b"):  # the last one replaces a corpus of ours
        stories.write(str(tmp_path / run), num_stories=200)
    first, second = ({str(path.relative_to(tmp_path / run)): path.read_bytes()
                      for path in (tmp_path / run).rglob("*") if path.is_file()} for run in ("a", "b"))
    assert first == second
    assert sorted(os.listdir(tmp_path / "a")) == ["TinyStories_all_data", "entropy.json"]
    assert len(first) == 1 + stories.NUM_SHARDS


def test_shards_of_others_are_not_replaced(tmp_path):
    shard = tmp_path / "TinyStories_all_data" / "data00.json"
    shard.parent.mkdir()
    shard.write_text("[]")
    with pytest.raises(ValueError, match="another --data_dir"):
        stories.write(str(tmp_path), num_stories=200)
    assert shard.read_text() == "[]" and os.listdir(tmp_path) == ["TinyStories_all_data"]


def test_too_few_stories_for_the_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_stories is 19, expected at least 20"):
        stories.write(str(tmp_path), num_stories=19)


def test_a_killed_run_leaves_no_folder_under_its_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(stories, "measure", lambda stories: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stories.write(str(tmp_path), num_stories=200)
    assert not (tmp_path / "TinyStories_all_data").exists() and not (tmp_path / "entropy.json").exists()
    monkeypatch.undo()
    stories.write(str(tmp_path), num_stories=200)
    assert sorted(os.listdir(tmp_path)) == ["TinyStories_all_data", "entropy.json"]


# -----------------------------------------------------------------------------
# chains and texts


def test_a_parsed_story_gives_back_its_only_chain():
    for text, chain in SAMPLE[:500]:
        assert parse(text, GRAMMAR) == chain


@pytest.mark.parametrize("change", [
    lambda text: text + " ", lambda text: text[:-1], lambda text: text.replace(".", "!", 1), str.lower,
    lambda text: text.replace(" a ", " an ", 1), lambda text: "", lambda text: text + " " + text,
    lambda text: text.replace(". ", ". // ", 1), lambda text: re.sub(r"\ban\b", "a", text),
    lambda text: text.replace("\n\n", " // "),
    lambda text: re.sub(r"\b(she|he)\b", lambda match: {"he": "she", "she": "he"}[match[0]], text)])
def test_what_the_grammar_cannot_say_is_refused(change):
    for text, _ in SAMPLE[:20]:
        if change(text) != text:
            with pytest.raises(ValueError, match="0 derivations"):
                parse(change(text), GRAMMAR)


def test_a_text_with_two_chains_is_refused():
    for grammar, text in (("story = (a|a)", "A"), ("story = (a|ab)(c|bc)", "Abc"),
                          ("story = <few>(| {girl})\nfew = Ann|Ann Uma", "Ann Uma"),
                          ("story = {pet}(| and {pet2})(| and {pet2})", "Cat and owl")):
        with pytest.raises(ValueError, match="2 derivations"):
            parse(text, read_grammar(grammar, TINY_WORDS))


def test_all_chains_of_a_tiny_grammar_are_counted_by_hand():
    grammar, texts = read_grammar(TINY, TINY_WORDS), {}
    # names, pets and endings; untold, or told with the food of either pet; the second rule's toys and kids
    for text, chain in distinct_stories(4 * 3 * 4 * (2 + 3 + 2) + 2 * (2 + 1), grammar):
        texts[text] = [n for _, n in chain]
        assert parse(text, grammar) == chain
    assert texts["Ann and Ed had a cat. Odd cat."] == [2, 4, 3, 2, 2, 2, 3]
    assert texts["Ed and Uma had an owl.\n\nHe gave it mice and told her. The owl!"] == [2, 4, 3, 2, 2, 2, 2]
    assert texts["Every top, a ball and the top. Nobody!"] == [2, 2, 2]  # the other toy is no choice
    assert sum(1 / math.prod(chain) for chain in texts.values()) == pytest.approx(1)
    assert bits([[(0, 8), (1, 2)], [(2, 4)]]) == 6


def test_drawn_chains_are_as_frequent_as_their_bits_say():
    grammar, rng, counts = read_grammar(TINY, TINY_WORDS), random.Random(0), collections.Counter()
    chains = [tell(grammar, lambda n: int(rng.random() * n))[1] for _ in range(20_000)]
    counts.update(tuple(chain) for chain in chains)
    for chain, count in counts.items():
        expected = len(chains) / math.prod(n for _, n in chain)
        assert abs(count - expected) < 5 * expected ** 0.5


def test_no_option_or_word_occurs_twice_in_its_list():
    def check(options):
        assert len(set(options)) == len(options)
        for option in options:
            for part in option:
                if type(part) is tuple:
                    check(part)
    check(STORY)
    for words in LISTS.values():
        assert len(set(words)) == len(words)


# -----------------------------------------------------------------------------
# the English


def test_pronouns_fit_the_children_of_a_story():
    checked = collections.Counter()
    for text, _ in SAMPLE:
        words = re.findall(r"\w+", text)
        names = [word for word in words if word in BOYS | GIRLS]
        children = {name for name in names if names.count(name) > 1}  # the others are only named
        for group, wrong in ((BOYS, {"she", "She", "her", "Her"}),
                             (GIRLS, {"he", "He", "him", "his", "His"})):
            if children and children <= group:
                checked[min(wrong)] += 1
                assert not set(words) & wrong, text
    assert len(checked) == 2 and min(checked.values()) >= 500


def test_articles_fit_the_next_word():
    for text, _ in SAMPLE:
        assert not re.search(r"\b[Aa] [aeiouAEIOU]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"\b[Aa]n (uni|use|one)|\b[Aa] (hour|hono|heir)", text), text


def test_no_word_is_said_twice_in_a_row():
    for text, _ in SAMPLE:
        assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text


def test_sentences_quotes_and_paragraphs_are_well_formed():
    for text, _ in SAMPLE:
        assert text == text.strip() and "  " not in text and "\n\n\n" not in text
        assert re.fullmatch(r"[A-Z].*[.!?]", text, re.DOTALL)
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n\n"))
        assert not re.search(r'[.!?] [a-z]|["\s][,.]|[|(){}<>]', text), text
        assert 350 <= len(text) <= 850


def test_the_food_of_an_animal_fits_it():
    foods = {pet: set(LISTS[pet]) for pet in LISTS["pet"]}
    fed = 0
    for text, _ in SAMPLE:
        pets = set(foods) & set(text.split())
        food = re.search(r"(?:gave|brought|fetched|got) it some (\w+)", text)
        if food and len(pets) == 1:
            fed += 1
            assert food[1] in foods[pets.pop()], text
    assert fed >= 20
