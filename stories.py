"""The built-in demo corpus: little stories from a grammar that knows its own entropy.

    python stories.py --data_dir data

writes data/TinyStories_all_data/data00.json (validation), data01.json … (train), each a JSON array of
{"story": text} as TinyStories has it, and data/entropy.json: how many bits the choices in each split hold.

A story is a chain of choices, each uniform among the options open at that point and visible in the text. No
two chains give the same text (`parse` searches for a second one), so a text is as likely as its chain: the
bits of the choices, divided by the bytes of the text, are the floor that no model can beat on average.

The grammar is a list of rules, "rule = text", or "rule:" and a line with a dash for each option. The first
rule is `story`. Lines that begin with two spaces continue the one before. A text consists of

    (ran|walked)     one of these
    <soon>           one of the options of that rule
    <food>           a word of that list that is not yet in the story
    {toy} {toy2}     a word of that list, the same throughout the story, and another one
    {name=girl}      the same as {name}, chosen from the list girl
    {treat:pet}      chosen from the list that is named as this story's {pet}
    {he} {him2}      the pronoun of {name}, of {name2}
    //               a new paragraph

At the end, sentences and speech get their capital, and "a" gets its "n" before a vowel.
"""

import functools
import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from plumbing import cli
from plumbing.documents import SHARDS
from plumbing.files import complete, complete_folder

NUM_SHARDS = 20  # the first of them is validation

# -----------------------------------------------------------------------------
# Words and grammar

WORDS = """
girl: Lily, Anna, Mia, Ella, Lucy, Amy, Sara, Molly, Emma, Zoe, Ruby, Nora, Kate, Jane, Alice, Clara, Maya,
  Eva, Tina, Hannah, Julia, Betty, Fiona, Leah, Nina, Lola, Maria, Emily, Sophie, Chloe, Bella, Abby
boy: George, Tom, Ben, Sam, Max, Tim, Leo, Adam, Finn, Oscar, Henry, Noah, Luke, Peter, Billy, Dan, Eli,
  Fred, Hugo, Jake, Kevin, Liam, Owen, Paul, Theo, Felix, Zack, Alex, Bobby, Carl, David, Jack
friend: Paula, Rita, Tess, Wendy, Vera, Ada, Carla, Dora, Elsa, Gina, Heidi, Jenny, Laura, Marta, Naomi,
  Polly, Rosa, Sally, Tanya, Susie, Annie, Lisa, Helen, Nancy, Ellie, Linda, Mandy, Becky, Cora, Millie, Ida,
  Lena, Eric, Harry, Ian, Jim, Karl, Mike, Ned, Otto, Pablo, Ralph, Simon, Toby, Victor, Andy, Bruno, Chris,
  Dylan, Ethan, Hans, Ivan, Joey, Martin, Robert, Thomas, Daniel, Jonas, Lucas, Oliver, Philip, Ronny,
  Walter, Willy, Ali, Amir, Anton, Bert, Boris, Ken, Gus, Igor, Kurt, Lars, Marco, Nils, Omar, Ravi, Rory,
  Sven, Tony, Una, Yuki, Zara, Olga, Mina, Kim, Jill, Inga, Hilda, Greta, Faye, Edith, Dina, Berta, Alma
food: apples, pears, plums, grapes, cherries, peaches, carrots, sandwiches, cookies, muffins, bananas, nuts,
  raisins, crackers, pancakes, eggs, tomatoes, waffles, buns, noodles, donuts, melon, oranges, peas, beans,
  potatoes, cake, bread, rice, jam, yogurt, ham, chicken, corn, popcorn, pudding, salad, toast, jelly, pizza,
  pasta, chocolate, candy, pie, dumplings, cupcakes, biscuits, rolls, walnuts, sausages, soup, fish, lemons,
  berries, pretzels, fruit, mushrooms, cereal, turkey, brownies, burgers, tacos, figs, olives
animal: frog, bee, duck, rabbit, snail, beetle, spider, ladybug, ant, goose, swan, owl, robin, dove, hen,
  cat, dog, lizard, toad, worm, moth, butterfly, mole, fox, deer, goat, pony, cow, horse, pig, cricket,
  pigeon, donkey, otter, beaver, calf, parrot, bat, eagle, stork, sheep, seagull, rat, hawk, heron, fly,
  rooster, crow, turtle, chipmunk, badger, piglet, bird, foal, wasp, raccoon, duckling, dragonfly,
  caterpillar, peacock, weasel, hare, gecko, bull
thing: crown, mask, marble, bell, book, hat, cap, ring, key, flag, shell, lantern, crayon, pencil, necklace,
  watch, bracelet, stone, spoon, button, coin, feather, brush, comb, sock, glove, box, bottle, candle, card,
  map, stamp, leaf, brick, net, rope, basket, blanket, pillow, nail, cork, pin, stick, belt, tie, fork, mug,
  jar
toy: ball, doll, drum, robot, kite, puppet, whistle, flute, train, truck, boat, plane, rocket, car, bus,
  wagon, trumpet, teddy bear, dinosaur, dragon, yo-yo, puzzle, balloon, tractor, guitar, pinwheel, top, horn,
  bucket, shovel, banjo, scooter
colour: red, blue, green, yellow, orange, purple, pink, brown, white, black, gray, silver, golden, striped,
  spotted
big: big, little, tiny, small, fat, thin, old, young, busy, shy, sleepy, hungry, happy, funny, lazy, lonely,
  proud, silly, noisy, clever, brave, gentle, quiet, sad, curious, playful, wet, cute
new: new, old, shiny, dusty, pretty, dirty, broken, plain, nice, muddy, wooden, huge, lost, lovely, strange,
  tiny
furniture: bed, sofa, table, door, curtain, rug, piano, desk, couch, bookcase, chair, bathtub, dresser,
  stove, stairs, window
petname: Fluffy, Spot, Coco, Pip, Biscuit, Pepper, Button, Snowball, Ginger, Patch, Bubbles, Muffin, Cookie,
  Shadow, Lucky, Pickle, Sunny, Teddy, Daisy, Peanut, Rusty, Star, Honey, Happy
limb: knee, hand, foot, arm, elbow, leg, toe, finger
elder: mom, dad, mommy, daddy, grandma, grandpa, aunt, uncle
cloth: scarf, towel, napkin, ribbon
weekday: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
fragile: cup, vase, plate, bowl, lamp, clock, teapot, mirror
pet: kitten, puppy, bunny, squirrel, mouse, hedgehog, lamb, sparrow
kitten: milk, cream, tuna
puppy: meat, bones
bunny: clover, cabbage
squirrel: acorns, seeds
mouse: cheese, crumbs, oats
hedgehog: slugs, worms
lamb: hay, grass
sparrow: seeds, crumbs
place: park, beach, farm, forest, lake, zoo, market, meadow, river, pond, school, garden, village, hill,
  playground, harbor
spot: bench, fence, gate, oak tree, well, path, fountain, rose bush, wall, hedge, swing, bridge, statue,
  sign, barrel, ladder
"""

GRAMMAR = """
story:
- Once upon a time, there (was|lived) a <kind> <kid> who <fond>. {he} <met> <friends>. (|// )<when>, {name}
  <solo>
- One day, {name} (<had> <meal> with <friends>. <soon> {name} <solo>|and {name2} <had> <meal> with <friends>.
  <soon> {name} and {name2} <duo>)
- {name} and {name2} were best friends. {name} <fond>, and {name2} <fond>. (|// )<when>, {name} and {name2}
  <duo>
- On a dark and stormy night, {name} <storm>
- {name} was <six> years old and <fond>. {he} <met> <friends>. (|// )<when>, {name} (<solo>|and {his} <pal>
  {name2} <duo>)
solo:
- lost {his} {colour} {toy}. {name} looked <near> the <furniture>, <near> the <furniture> and <near> the
  <furniture>, but {he} only found <things>. "<oh>, <comfort>," {his} {elder} <said>.(| //) <soon> {name} saw
  something {colour} <near> the <furniture>. It was the {toy}! {name} <cheered>. <later> {name} (showed|took)
  the {toy} to <friends>.
- <went>. <near> the <spot>, {name} <found> a <big> {pet}. {name} gave the {pet} <meal>, but the {pet} (only
  sniffed|turned away|would not eat|looked away). {name} <very> <sad>, ran home and <fed>.(| //) {name}
  (called|named) the {pet} {petname}. <later> {name} (showed|took) {petname} to <friends>, and {petname}
  <slept>.
- was playing with a {colour} {toy}. <soon> the {toy} (hit|fell on|knocked over) {his} {elder}'s <colour>
  {fragile}, and the {fragile} broke. {name} <very> <sad> and could not eat {his} <meal>.(| //) <soon> {name}
  told {his} {elder} the truth. "<oh>, <forgive>," {his} {elder} <said>. {name} and {his} {elder}
  (glued|mended|fixed) the {fragile}. <later> {name} <end>.
duo:
- <went>. {name} had a {colour} {toy}, and {name2} wanted (to play with|to hold|to try|to have) the {toy}.
  "<oh>, <mine>," {name} (said|cried|called|shouted). {name2} <very> <sad> and watched <animals>.(| //)
  <soon> {name} gave {name2} the {colour} {toy}. "<oh>, <yours>," {name} <said>. <later> {name} and {name2}
  <end>.
- <went>. {name2} <very> <sad>, for {his2} {colour} {toy} was (gone|lost|missing). They looked <near> the
  <spot>, but they only saw <animals>.(| //) <soon> {name} <found> a <big> {pet} <near> the <spot>. The {pet}
  had the {toy}! {name} <fed>, and {name2} got the {toy}. <later> {name} and {name2} <end>.
- <went>. {name2} (fell|tripped|slipped|stumbled) <near> the <spot> and hurt {his2} {limb}. "<oh>,
  <comfort>," {name} <said>. {name} tied a <colour> {cloth} around the {limb} and told {name2} about
  <animals>.(| //) <soon> {name2} <very> <glad> and <cheered>. <later> {name} and {name2} <end>.
storm:
- <had> <meal> with {his} {elder}. <soon> {name} heard a noise. {name} <very> <afraid> and held {his}
  {colour} {toy}. "Is it a <big> <animal>, a <big> <animal> or a <big> <animal>?" {name}
  (asked|whispered|cried|called). {his} {elder} opened the door, and in (ran|came|jumped|hopped) a <big>
  {pet}.(| //) {name} <fed> and (called|named) the {pet} {petname}. <soon> {petname} slept <near> the {toy}.
  <dawn> {name} and {petname} <saw> <animals>.
- was playing with a {colour} {toy} when the lights went (out|off). {name} <very> <afraid> and hid <near> the
  <furniture>. "<oh>, <comfort>," {his} {elder} <said>. {name} and {his} {elder} ate <meal> and told stories
  about <animals>.(| //) <soon> {name} <very> <glad> and fell asleep with the {toy}. <dawn> {name} <end>.
end = <had> <meal> with <friends>|told <friends> <news> over <meal>|<saw> <animals> with <friends>
fond:
- (loved|liked|enjoyed) <meal>
- <knew> a (song|story|poem|riddle) about <animals>
- (kept|had|collected) <things>
meal = (|<food>, )<food>, <food>, <food> and <food>
friends = (|<friend>, |<friend>, <friend>, )<friend>, <friend>, <friend> and <friend>
animals = (|a <big> <animal>, )a <big> <animal>, a <big> <animal> and a <big> <animal>
things = (|a <new> <thing>, )a <new> <thing>, a <new> <thing> and a <new> <thing>
kid = girl (named|called) {name=girl}|boy (named|called) {name=boy}
six = three|four|five|six|seven|eight|nine|ten
kind = kind|clever|brave|shy|cheerful|curious|gentle|quiet|funny|little|friendly|playful|polite|lively|young|
  calm
met = (often|always|sometimes) (played with|met|visited|saw)
pal = friend|cousin|neighbor|classmate
went = (ran|walked|hurried|skipped|rushed|raced|marched|hopped) to the {place}
near = near|beside|behind|by
had = had|ate|shared|enjoyed
knew = knew|made up|liked|loved
news = about it|everything|the story|the news
saw = saw|watched|fed|drew|painted|sang about|talked about|read about
found = saw|found|spotted|noticed
fed = (gave|brought|fetched|got) it some {treat:pet}
very = (was|felt) (very|so|really|quite)
sad = sad|upset|unhappy|gloomy|miserable|down|glum|troubled
glad = happy|cheerful|glad|brave|calm|safe|merry|strong
afraid = afraid|scared|frightened|worried|nervous|anxious|uneasy|startled
cheered = laughed|smiled|cheered|clapped|giggled|danced|sang|beamed
slept = slept|played|hopped|jumped|rolled over|fell asleep|sat still|looked happy
oh = Oh|Well|Look|Hey|Listen|You know|Hmm|Ah
said = said|whispered|answered|replied|said softly|said gently|said kindly|murmured
when = One <sunny> (morning|day|afternoon)|On a <sunny> <weekday>|On <weekday>
sunny = sunny|warm|windy|cool|bright|cloudy|misty|breezy|lovely|mild|clear|beautiful
soon = Soon|Then|After a while,|A little later,|After that,|A moment later,|Before long,|A few minutes later,
later = That evening,|The next day,|On <weekday>,|<soon>
dawn = In the morning,|The next day,|When the sun came up,
comfort = I can help you|don't cry|don't worry|all will be well|let me help|take my hand|be brave|
  it will be fine|I am here|you are not alone|stay calm|come here|trust me|give me a hug|you are so brave|
  wait for me
forgive = thank you for telling me|I am not angry|we can fix it|telling the truth is brave|never mind|
  I forgive you|that was brave of you|it was very old
mine = it is mine|you can't have it|I had it first|I want it myself|you will break it|I need it|go away|
  leave it alone
yours = it is your turn|I am sorry|let us play together|it is good to share|it is more fun with you|
  don't be sad|please forgive me|I was not nice
"""

# -----------------------------------------------------------------------------
# From the grammar to stories and back

PRONOUNS = {"he": "she", "him": "her", "his": "her"}


class Variable(NamedTuple):  # It is written <list>, {name}, {name=source} or {name:source}.
    name: str  # "" for a word that does not come again
    source: str  # the list to choose from; "{pet}" stands for the word of that variable


def read_grammar(grammar=GRAMMAR, words=WORDS):
    """The rule `story` as a choice, and the lists, name -> words, that the two texts describe.

    A choice is a tuple of options, and an option is a tuple of str, choices and Variables.
    """
    lists = read_lists(words)
    rules = {}  # name -> text, with | between the options
    for entry in re.split(r"\n(?!- )", unfolded(grammar)):
        name, text = re.split(" = |:\n- ", entry, maxsplit=1)
        rules[name] = text.replace("\n- ", "|")

    @functools.cache
    def rule(name):
        tokens = re.findall(r"[(|)]|<\w+>|{[\w=:]+}|[^(|)<{]+", rules[name])
        return choice(iter(tokens))

    def choice(tokens):
        """Takes tokens up to the closing parenthesis of a choice, or to the end."""
        options = [()]
        for token in tokens:
            if token == ")":
                break
            if token == "|":
                options.append(())
            else:
                part = choice(tokens) if token == "(" else text_or_variable(token)
                options[-1] += (part,)
        return tuple(options)

    def text_or_variable(token):
        if token[0] == "<":
            name = token[1:-1]
            return rule(name) if name in rules else Variable("", name)
        if token[0] != "{":
            return token
        base, number, mark, source = re.fullmatch(r"{([a-z]+)(\d*)([=:]?)(\w*)}", token).groups()
        if base in PRONOUNS:
            return Variable("", f"{base} {{name{number}}}")  # For Ben, {him} comes from the list "him Ben".
        if mark == ":":
            source = f"{{{source}}}"
        return Variable(base + number, source or base)

    return rule("story"), lists


def read_lists(words):
    """Name -> words of each list; the names of all children; and for each child, lists of one pronoun."""
    lists = {}
    for line in unfolded(words).split("\n"):
        name, text = line.split(": ")
        lists[name] = text.split(", ")
    lists["name"] = lists["girl"] + lists["boy"]
    for child in lists["name"]:
        for he, she in PRONOUNS.items():
            lists[f"{he} {child}"] = [she if child in lists["girl"] else he]
    return lists


def unfolded(text):
    """The text with lines that begin with spaces joined to the line before, by a space except after |."""
    return re.sub(r"\n +", " ", re.sub(r"\|\n +", "|", text.strip()))


def open_options(node, bound, lists):
    """The options of a choice or Variable, given the words of the variables met so far."""
    if type(node) is tuple:
        return node
    if node.name in bound:
        return ((bound[node.name],),)
    words = lists[node.source.format_map(bound)]
    used = set(bound.values())
    # A word comes only once in a story, except for pronouns, which are lists of one word.
    return tuple([(word,) for word in words if word not in used or len(words) == 1])


def tell(grammar, take):
    """A story and its chain of (taken, n), where take(n) chooses one of n open options, counted from 0."""
    start, lists = grammar
    todo = [start]  # the parts of the story that are still to come, in reverse
    text = ""
    chain = []
    bound = {}  # variable -> word; a variable without a name gets a number as its name
    while todo:
        node = todo.pop()
        if type(node) is str:
            text += node
            continue
        options = open_options(node, bound, lists)
        taken = 0
        if len(options) > 1:  # Where only one option is open, nothing is chosen and no bits are counted.
            taken = take(len(options))
            chain.append((taken, len(options)))
        if type(node) is Variable:
            bound = {node.name or len(bound): options[taken][0], **bound}
        todo.extend(reversed(options[taken]))
    text = re.sub(r"\ba (?=[aeiou])", "an ", text).replace(" // ", "\n\n")
    # A capital begins the text, a sentence, a paragraph, and speech (a quotation mark after white space).
    return re.sub(r'(^|\. |[!?] |\n\n|(?<!\S)")[a-z]', lambda match: match[0].upper(), text), chain


def parse(story, grammar):
    """The chain that gives a text, found by trying all; ValueError if there is none or a second one."""
    def retell(chain):
        steps = iter(chain)
        return tell(grammar, lambda n: next(steps)[0])[0]

    start, lists = grammar
    text = re.sub(r"\ban (?=[aeiou])", "a ", story.lower()).replace("\n\n", " // ")
    chains = []
    stack = [(0, (start,), {}, ())]  # (place in the text, parts to come, variable -> word, chain so far)
    while stack:
        at, todo, bound, chain = stack.pop()
        if not todo:
            if at == len(text):
                chains.append(list(chain))
            continue
        node = todo[0]
        later = todo[1:]
        if type(node) is str:
            if text.startswith(node.lower(), at):
                stack.append((at + len(node), later, bound, chain))
            continue
        options = open_options(node, bound, lists)
        for i, option in enumerate(options):
            # An option whose first text is not there need not be followed, which saves most of the search.
            if option and type(option[0]) is str and not text.startswith(option[0].lower(), at):
                continue
            met = {node.name or len(bound): option[0], **bound} if type(node) is Variable else bound
            link = ((i, len(options)),) if len(options) > 1 else ()
            stack.append((at, option + later, met, chain + link))
    # The search ignored capitals and articles, so each chain's story is now compared with the text itself.
    chains = [chain for chain in chains if retell(chain) == story]
    if len(chains) != 1:
        raise ValueError(f"{story[:60]!r}… has {len(chains)} derivations, expected one")
    return chains[0]


def bits(chains):
    """The bits of all choices in the chains; a choice among n options has log2(n)."""
    return math.fsum(math.log2(n) for chain in chains for _, n in chain)

# -----------------------------------------------------------------------------
# Files


def write(data_dir: str = "data", num_stories: int = 22_000):
    """Writes num_stories distinct stories in 20 shards, the first of them validation, and their entropy.

    ValueError: num_stories is too small, or the folder holds shards that aren't an earlier corpus of ours.

    Args:
        data_dir: folder that takes TinyStories_all_data and entropy.json
        num_stories: stories in all, at least 20; a twentieth of them is for validation
    """
    if num_stories < NUM_SHARDS:
        raise ValueError(f"num_stories is {num_stories}, expected at least {NUM_SHARDS}, one for each shard")
    folder = Path(data_dir, SHARDS)
    facts = Path(data_dir, "entropy.json")
    if folder.exists() and not facts.exists():
        raise ValueError(f"{folder} without {facts.name} is not ours to replace; choose another --data_dir")
    stories = distinct_stories(num_stories)
    num_val = num_stories // NUM_SHARDS
    entropy = {"val": measure(stories[:num_val]), "train": measure(stories[num_val:])}
    with complete_folder(folder) as part:
        for i in range(NUM_SHARDS):
            shard = stories[num_stories * i // NUM_SHARDS:num_stories * (i + 1) // NUM_SHARDS]
            records = [{"story": text} for text, _ in shard]
            (part / f"data{i:02d}.json").write_text(json.dumps(records, indent=0))
        shutil.rmtree(folder, ignore_errors=True)
        with complete(facts) as file:
            file.write(json.dumps(entropy, indent=0).encode())
    for split, e in entropy.items():
        print(f"{split}: {e['stories']:,} stories, {e['bytes']:,} bytes, {e['bits_per_byte']:.4f} bits/byte")


def distinct_stories(count, grammar=None, seed=1337):
    """A list of count different (text, chain); a story that comes a second time is replaced by another."""
    grammar = grammar or read_grammar()
    rng = random.Random(seed)
    stories = {}  # text -> chain
    while len(stories) < count:
        # random() gives the same numbers in every version of Python, which randrange does not.
        text, chain = tell(grammar, lambda n: int(rng.random() * n))
        stories.setdefault(text, chain)
    return list(stories.items())


def measure(stories):
    """What entropy.json says about stories (text, chain): how many, their UTF-8 bytes and their bits."""
    size = sum(len(text.encode()) for text, _ in stories)
    total = bits(chain for _, chain in stories)
    return {"stories": len(stories), "bytes": size, "bits": total, "bits_per_byte": total / size}


if __name__ == "__main__":
    cli.run({"write": write}, default="write")
