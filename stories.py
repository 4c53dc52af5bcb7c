"""The built-in demo corpus: little stories from a grammar that knows its own entropy.

    python stories.py --data_dir data

writes data/TinyStories_all_data/data00.json (validation), data01.json … (train), each a JSON array of
{"story": text} as TinyStories has it, and data/entropy.json: how many bits the choices in each split hold.

A story is a chain of choices, each uniform among the options open at that point and visible in the text. No
two chains give the same text (`parse` searches for a second one), so a text is as likely as its chain: the
bits of the choices, divided by the bytes of the text, are the floor that no model can beat on average.

How to read the grammar: "name = text", or "name:" and its options, one per dash; stories are what `story`
can become. Lists of words stand apart.

    (ran|walked)     one of these
    <happy>          one of the words, or options, of that name, anew every time
    {toy}            one of the words of that name, the same throughout the story
    {toy2}           another one of them
    {name=girl}      the same as {name}, chosen from the words named girl
    {spot:place}     chosen from the words that are named as this story's {place} is
    {he} {him2}      the pronoun of {name}, of {name2}
    //               a new paragraph

A name with a capital, as in <Oh>, gives its word one. "a" becomes "an" before a vowel.
"""

import collections
import functools
import json
import math
import os
import random
import re
import shutil
from typing import NamedTuple

import cli

DATA_DIR = "data"
SHARDS = "TinyStories_all_data"  # the folder of the shards, inside the data folder
NUM_STORIES = 22_000
NUM_SHARDS = 20  # the first is validation

# -----------------------------------------------------------------------------
# words and grammar

WORDS = """
girl: Lily, Anna, Mia, Ella, Lucy, Amy, Sara, Molly, Emma, Grace, Zoe, Ruby, Nora, Kate, Jane, Sue, Ivy,
Clara, Alice, Maya, Eva, Tina, Poppy, Hannah, Julia, Betty, Fiona, Leah, Nina, Olive, Lola, Maria, Emily,
Sophie, Chloe, Bella, Abby, Paula, Rita, Tess, Wendy, Vera, Ada, Bonnie, Carla, Dora, Elsa, Flora, Gina,
Heidi, Iris, Jenny, Kim, Laura, Marta, Naomi, Polly, Rosa, Sally, Tanya, Uma, Violet, Willa, Yara; boy:
George, Tom, Ben, Sam, Max, Tim, Jack, Leo, Adam, Finn, Oscar, Henry, Noah, Luke, Peter, Billy, Dan, Eli,
Fred, Hugo, Jake, Kevin, Liam, Mark, Nick, Owen, Paul, Ravi, Sid, Theo, Felix, Zack, Alex, Bobby, Carl,
David, Eric, Frank, Gus, Harry, Ian, Jim, Karl, Lars, Mike, Ned, Otto, Pablo, Ralph, Simon, Toby, Victor,
Will, Yuri, Andy, Bruno, Chris, Dylan, Ethan, Gabe, Hans, Ivan, Joey, Kofi; woman: mom, grandma, aunt; man:
dad, grandpa, uncle; nature: kind, clever, brave, shy, cheerful, curious, gentle, quiet, funny, smart,
friendly, playful, polite, lively, careful, fearless, proud, jolly, busy, calm, young, famous, patient,
helpful, strong, sleepy, hungry, thirsty, nervous, grumpy, wise, noisy; friend: friend, cousin, neighbor,
classmate, teammate, playmate, buddy, pal; hobby: painting, singing, dancing, reading, swimming, climbing
trees, riding bikes, flying kites, baking bread, picking flowers, telling jokes, playing chess, watching
birds, catching frogs, skipping rope, jumping in puddles; job: baker, farmer, teacher, doctor, painter,
sailor, gardener, singer, pilot, firefighter, carpenter, dancer, tailor, fisherman, cook, nurse, shoemaker,
musician, postman, miller, barber, plumber, beekeeper, potter, blacksmith, zookeeper, inventor, juggler,
poet, captain, shepherd, actor; odd: lazy, hungry, sleepy, silly, grumpy, brave, lonely, clever, polite,
proud, greedy, noisy, shy, magic, jolly, funny, friendly, sneaky, dizzy, lucky, fearless, bold, bossy, busy,
calm, charming, cheeky, clumsy, crafty, cuddly, curious, dreamy, eager, famous, fierce, fluffy, gentle,
giggly, graceful, handsome, lively, moody, nervous, patient, perky, playful, quick, quiet, restless, rude,
serious, slow, stubborn, thirsty, timid, wise, jumpy, merry, nosy, tame, witty, sad, cute, wild; tiny: big,
little, tiny, fat, thin, small, huge, mini, short, round, long, giant, slim, broad, large, wee; colour: red,
blue, green, yellow, orange, purple, pink, brown, white, black, gray, silver, gold, violet, tan, turquoise,
navy, teal, lilac, beige, scarlet, amber, crimson, aqua, indigo, maroon, coral, rosy, bronze, emerald, ivory,
copper; animals: cats, dogs, ducks, frogs, horses, cows, pigs, sheep, geese, bears, lions, foxes, owls,
whales, crabs, bees, snails, camels, monkeys, penguins, dragons, elephants, zebras, tigers, rabbits, mice,
seals, parrots, swans, turtles, dolphins, donkeys, ants, beavers, beetles, butterflies, chickens, cranes,
doves, eagles, fish, goats, lizards, llamas, moles, ponies, sharks, wolves, moths, otters, pandas, pigeons,
robins, roosters, shrimp, skunks, spiders, squirrels, toads, trolls, unicorns, worms, yaks, hens; creature:
dragon, whale, elephant, lion, tiger, bear, gnome, wizard, knight, pirate, mermaid, snail, spider, owl,
camel, penguin, dolphin, bee, crab, parrot, mole, king, queen, clown, dinosaur, zebra, giraffe, kangaroo,
hippo, seal, swan, peacock; new: wide, pretty, wonderful, new, fancy, strange, crooked, narrow, light, rough,
dusty, clean, plain, simple, lovely, cheap, funny, odd, perfect, splendid, beautiful, charming, curious,
dainty, elegant, fine, dull, magic, mighty, noble, precious, quaint, rare, neat, weird, dear, bent, cold,
sturdy, nice, grand, special, secret, smooth, flat, heavy, worn, faded, costly, modern, ancient, antique,
ordinary, patched, painted, glossy, shiny, gleaming, dirty, ugly, handmade, royal, forgotten, sparkling;
treasure: coins, shells, marbles, rings, stamps, pearls, beads, letters, buttons, stones, medals, keys,
candies, photographs, spoons, feathers, stars, hearts, stickers, corks, ropes, bottles, twigs, petals,
ribbons, candles, crayons, pencils, brushes, postcards, balloons, bells, acorns, badges, bolts, cards,
charms, combs, corals, dice, flags, gems, hooks, jewels, lanterns, magnets, mirrors, mugs, nails, necklaces,
needles, paintings, pebbles, pens, pins, pipes, plates, puzzles, spools, seashells, tickets, tops, vases,
watches; tasty: tasty, sweet, fresh, ripe, warm, juicy, crunchy, big, small, tiny, salty, sour, yummy, hot,
cold, soft, hard, round, green, golden, crisp, creamy, dry, spicy, huge, perfect, fine, good, strange, old,
delicious, frozen; food: apples, pears, plums, grapes, cherries, peaches, carrots, sandwiches, cookies,
muffins, bananas, nuts, raisins, crackers, pancakes, eggs, strawberries, pretzels, tomatoes, waffles, buns,
biscuits, noodles, tarts, blueberries, sausages, radishes, meatballs, dumplings, walnuts, rolls, figs,
apricots, cupcakes, donuts, lemons, melons, mushrooms, olives, onions, oranges, pickles, pies, potatoes,
pumpkins, turnips, cakes, beans, beets, chestnuts, chips, dates, kiwis, leeks, mangoes, meringues, omelets,
parsnips, pastries, peas, peppers, pizzas, toffees, truffles; drink: milk, lemonade, cocoa, tea, apple juice,
cold water, hot soup, grape juice; few: two, three, four, five, six, seven, eight, nine; teen: ten, eleven,
twelve, thirteen, fourteen, fifteen, sixteen, seventeen; tens: twenty, thirty, forty, fifty, sixty, seventy,
eighty, ninety; weekday: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday; sunny: sunny, warm,
windy, cool, bright, cloudy, quiet, misty, breezy, fine, lovely, mild, clear, fresh, calm, beautiful; little:
little, quiet, tiny, pretty, lonely, sleepy, busy, faraway, snowy, sunny, merry, cozy, dusty, shady, foggy,
green; village: village, town, valley, city, cottage, farmhouse, house, cabin; sea: sea, river, hills, woods,
mountains, mill, railway, harbor, castle, desert, church, bridge, canal, cliffs, swamp, airport; toy: ball,
doll, drum, robot, kite, puppet, whistle, flute, yo-yo, toy train, toy truck, toy boat, toy plane, toy
rocket, toy horse, toy bus, teddy bear, spinning top, jump rope, magic wand, paper crown, rag doll, rubber
frog, wooden duck, music box, trumpet, pinwheel, toy car, toy tiger, toy castle, marble, puzzle; garment:
hat, coat, scarf, sweater, jacket, cap, shirt, raincoat, cape, vest, belt, hood, poncho, apron, shawl,
blouse; footwear: boots, shoes, socks, sandals, slippers, mittens, gloves, pants; furniture: bed, sofa,
table, chair, desk, piano, cupboard, bookcase, bench, stove, armchair, bathtub, dresser, stool, wardrobe,
carpet; outside: fence, hedge, mailbox, swing, woodpile, doghouse, wheelbarrow, rose bush, apple tree, car,
gate, barrel, bicycle, trash can, wall, ladder; room: kitchen, attic, cellar, garage, hallway, bathroom,
bedroom, barn; box: box, basket, blanket, pillow, bucket, suitcase, towel, newspaper, rug, backpack, cushion,
sheet, sack, book, umbrella, quilt; chest: box, bag, basket, chest, drawer, crate, bin, sack; fragile: cup,
vase, plate, bowl, lamp, clock, teapot, mirror; tool: shovel, spade, rake, hoe, pick, spoon, stick, fork;
tower: fort, raft, tower, castle, bridge, playhouse, scarecrow, wagon; plant: bean, pumpkin, tomato,
sunflower, melon, daisy, poppy, tulip; skill: swim, whistle, juggle, skate, ski, knit, sew, yodel, ride a
bike, play the piano, row a boat, walk on stilts, climb a rope, write poems, bake bread, tap dance; fear: the
dark, thunder, spiders, big dogs, deep water, loud noises, high places, bees, ghosts, the dentist, strangers,
snakes; moon: on the moon, in the clouds, under the sea, on a rainbow, in a castle, on a island, in the snow,
on a train, in the desert, at a party, on the roof, in a teapot, in the jungle, on a mountain, at school, in
a boat; ran: ran, walked, hurried, skipped, raced, rushed, marched, hopped, dashed, strolled, jogged,
trotted, sprinted, wandered, galloped, tiptoed; cheered: cheered, clapped, laughed, giggled, danced, smiled,
sang, whistled, grinned, jumped, beamed, chuckled, hopped, twirled, waved, bowed; happily: happily, gladly,
merrily, quickly, slowly, cheerfully, bravely, quietly, eagerly, boldly, briskly, lazily, proudly, calmly,
noisily, politely, gently, softly, joyfully, lightly, playfully, swiftly, silently, carefully, wildly,
gracefully, clumsily, dreamily, busily, patiently, secretly, smoothly; happy: happy, glad, proud, cheerful,
pleased, merry, thankful, joyful, delighted, excited, lucky, calm, jolly, strong, brave, grateful; very:
very, so, quite, rather, really, truly, a bit, a little, terribly, awfully, extremely, ever so, unusually,
deeply, simply, pretty; sad: sad, lonely, sorry, upset, unhappy, gloomy, hurt, ashamed, worried, miserable,
tired, small, bad, sick, hopeless, confused; softly: softly, gently, kindly, calmly, warmly, quietly,
sweetly, slowly, tenderly, patiently, politely, bravely, seriously, with a smile, with a wink, with a nod;
oh: oh, well, hey, look, listen, ah, gosh, hmm, you know, goodness, dear me, now, wow, say, aha, oh my; oops:
oops, oh no, crash, bang, bump, boom, oh dear, whoosh; then: then, soon, later, finally, suddenly, at last,
just then, before long, after a while, moments later, right then, a minute later, some time later, very soon,
in the end, all at once; loud: loud, soft, strange, sad, squeaky, tiny, funny, odd; wet: wet, dusty, dirty,
muddy, sticky, cold, sandy, torn; good: good, wise, kind, smart, brave, nice, great, sweet; petname: Fluffy,
Spot, Coco, Pip, Biscuit, Pepper, Button, Snowball, Ginger, Patch, Bubbles, Muffin, Cookie, Shadow, Lucky,
Pickle; pet: kitten, puppy, rabbit, squirrel, mouse, hedgehog, lamb, sparrow, turtle, piglet, raccoon, crow;
kitten: milk, fish, cream; puppy: meat, ham, rice; rabbit: lettuce, clover, cabbage; squirrel: nuts, acorns,
seeds; mouse: cheese, bread, crumbs; hedgehog: berries, worms, melon; lamb: hay, grass, clover; sparrow:
seeds, worms, millet; turtle: lettuce, berries, cucumber; piglet: corn, potatoes, turnips; raccoon: fish,
berries, eggs; crow: corn, nuts, meat; place: park, beach, farm, forest, lake, zoo, market, meadow; park:
bench, fountain, slide, oak tree, statue, flower bed; beach: rowboat, lighthouse, sand dune, palm tree, pier,
tide pool; farm: barn, tractor, haystack, henhouse, well, pigpen; forest: fallen log, stump, pine tree,
stream, boulder, cave; lake: dock, willow tree, canoe, boathouse, picnic table, waterfall; zoo: ticket booth,
monkey house, duck pond, snack bar, aquarium, lion cage; market: fruit stand, flower stall, bakery, clock
tower, bus stop, toy shop; meadow: maple tree, creek, windmill, beehive, scarecrow, stone wall
"""

GRAMMAR = """
story:
- Once upon a time,(| in a <little> <village> (by|near) the <sea>,) there (was|lived) a <kid>. <about>
  <later>
- One day, {name} (and {name2} <duo>|ate <snack> with {name4} and {name5}. (Then|Later|Soon|After that,) {he}
  <solo>)
- {name} and {name2} were best friends. <both> <when>, they <duo>
- On a dark and stormy night, {name} <storm>
- {name} was <few> years old and (loved|liked|enjoyed) {hobby}. <about> <later>
- In a <little> <village> (by|near) the <sea>, there (was|lived) a <kid>. <about> <later>
kid = <nature> (girl named {name=girl}|boy named {name=boy})
later:
- <more> (|// )<when>, ({he}|{name}) <solo>
- (|// )<when>, {he} and {his} <nature> <friend> {name2} <duo>
when = One <sunny> (morning|day|afternoon)|On a <sunny> <weekday> (morning|afternoon)|On <weekday>
number = <few>|<teen>|<tens>-<few>
herd = <number> <odd> <tiny> <colour> <animals>
riches = <number> <tiny> <new> <colour> <treasure>
snack = (<few>|<teen>) <tasty> <food>
clothes = <new> <colour> <garment>
worker = <nature> <job>
by = (under|behind|beside|near|by) a <new> <colour>
said = (said|whispered|murmured|mumbled|called|cried|laughed|sighed) <softly>
about:
- {He} wore a <clothes> and <new> <colour> <footwear>.
- {He} liked <tasty> <food>, <drink> and <new> <colour> <treasure>.
- {He} wanted to be a <worker> and have <herd>.
- {He} had <herd> and a <new> <colour> <toy>.
more:
- {He} often played with {name4}, {name5}, {name6} and <herd>.
- {His} (best|old|new) friends were {name4}, {name5}, {name6} and a <worker>.
- {He} knew {name4}, {name5}, {name6} and a <odd> <tiny> <creature>.
both:
- They (both|always) (liked|loved) {hobby} and <food>. They often saw {name4}, {name5}, {name6} and <herd>.
- {name} had a <clothes> and <herd>, and {name2} had <new> <colour> <footwear>.
- They had <riches>, a <new> <colour> <toy> and <herd>.
solo:
- lost {his} <new> {colour} {toy}. {He} looked <by> <furniture> and <by> <outside>, but {he} only saw
  <riches>. "<Oh>, try the {room}," {his} <nature> {elder} <said>. {He} <ran> <happily> there.(| //) <By>
  <box> lay the {toy}, <wet> but safe! {name} <cheered> <happily> and showed it to <herd>. <end>
- broke {his} {elder}'s <new> <colour> {fragile} with a <new> <colour> <toy>. {He} felt <very> <sad> and hid
  it <by> <furniture>.(| //) <Then> {he} told {his} {elder} about it. "<Oh>, it is <good> to tell the truth,"
  {his} {elder} <said>. They fixed it with <riches> and painted <herd> on it. <end>
- grew <very> afraid of {fear}. "<Oh>, think of <herd>," {his} <nature> {elder} <said> and gave {him} a <new>
  {colour} {toy}.(| //) {name} ate <snack>, held the {toy} and thought of <herd>. <Then> {he} <cheered>
  <happily>. {He} was not afraid of {fear} anymore! <end>
- saw a <nature> {job} {skill}. {He} <happily> tried it in a <clothes>, but {he} fell over <riches>. "<Oh>,
  try again," the {job} <said>.(| //) {name} ate <snack> and practiced <by> <outside>. On <weekday>, {he}
  could {skill}! "<Oh>, it is <good> to keep trying," the {job} <said> and gave {him} <riches>. <end>
- planted <number> <colour> {plant} seeds <by> {outside}, but nothing grew. {He} felt <very> <sad>. "<Oh>, it
  is <good> to wait," {his} <nature> {elder} <said>.(| //) {name} <happily> told the seeds about <herd>. On
  <weekday>, the {plant} was taller than the {outside}! {name} gave {his} {elder} <snack> and <riches>. <end>
- <ran> <happily> to the <little> {place}. Near the <new> {spot:place} was a <odd> <tiny> <colour> {pet}.
  "<Oh>, are you hungry?" {name} <said>. {He} gave it <snack>, but it looked <very> <sad>.(| //) <Then>
  {name} <ran> home and got some {treat:pet} in a <new> <colour> <chest>. {He} called the {pet} {petname}.
  Every <weekday>, {petname} got some {treat} and played with <riches>. <end>
- found a <new> <colour> map of the <little> {place}. {He} put on a <clothes> and <ran> <happily> to the
  <new> {spot:place} there. {He} dug with a <colour> {tool}, but {he} only found a <wet> <box>. {name} felt
  <very> <sad> and ate <snack>.(| //) <Then> the {tool} hit <riches>! {name} <cheered> <happily> and hid them
  <by> <furniture>. <end>
- fell asleep <by> <furniture> and dreamed of a <odd> <tiny> {creature}. <dream> <end>
- met a <nature> {job} with <snack>. <Oops>! They fell <by> <outside>. The {job} felt <very> <sad>. "<Oh>, I
  will help you," {name} <said>. {He} put them <happily> in a <new> <colour> <chest>.(| //) The {job}
  <cheered> <happily> and gave {him} <riches>. On <weekday>, they drank <drink> and fed <herd>. <end>
dream:
- It wore a <clothes> and looked for a {colour} {toy} <moon>. "<Oh>, I will help you," {name} <said>. {He}
  <ran> <happily> past <herd> and found the {toy} <by> <outside>.(| //) The {creature} <cheered> <happily>
  and gave {him} {few} <new> <colour> {treasure}. When {name} woke up, there were {few} {treasure} <by>
  <box>!
end:
- That evening, {he} ate <snack> with {name7}, {name8} and {name9}.
- {name} <happily> painted <herd> for {name7}, {name8} and {name9}.
- {He} told {name7}, {name8} and a <worker> about it and <cheered> <happily>.
- That night, {he} dreamed of {name7}, {name8} and <herd> <moon>.
- {name} felt <very> <happy> and gave {name7}, {name8} and {name9} <snack>.
duo:
- <ran> <happily> to the <little> {place} with a <new> {colour} {toy}. {name} would not share it, and {name2}
  felt <very> <sad>. {He2} sat near the <new> {spot:place} and counted <herd>.(| //) <Then> {name} <ran> to
  the {spot}. "<Oh>, take the {toy} until <weekday>," {he} <said>. "<Oh>, it is <good> to share," {name2}
  <said> and gave {him} <snack>. <ends>
- <ran> <happily> to the <little> {place}. {name2} felt <very> <sad>, for {his2} <new> {colour} {toy} was
  lost. They asked a <worker> and looked near the <new> {spot:place}, but they only found <riches>.(| //)
  <Then> {name} saw a <odd> <tiny> <colour> {pet} near the <new> {spot2:place}. It had the {toy}! "<Oh>, let
  us swap," {he} <said> and gave it some {treat:pet} and <riches>. {name2} <cheered> <happily>. <ends>
- <ran> <happily> to the <little> {place}. {name2} fell over a <wet> <colour> <box>. "<Oh>, I will help you,"
  {name} <said>. {He} gave {him2} a <clothes> and <happily> told {him2} about <herd>.(| //) <Then> {name2}
  felt <very> <happy>. They <ran> <happily> to the <new> {spot:place} and ate <snack>. {name} was a <good>
  friend. <ends>
- <ran> <happily> to the <little> {place} and found <riches> in a <new> {colour} {chest}. {name2} wanted to
  keep it. "<Oh>, it is not ours," {name} <said>.(| //) Near the <new> {spot:place}, they met a <nature>
  {job} who felt <very> <sad>. They gave the {job} the {colour} {chest}. "<Oh>, you are <good>," the {job}
  <said> and gave them <snack> and a <new> <colour> <toy>. <ends>
- built a <new> {tower} <by> <outside>. {name} wanted to paint it {colour}, but {name2} liked {colour2}, felt
  <very> <sad> and went home.(| //) On <weekday>, {name} ate <snack> and <ran> <happily> to {name2}. "<Oh>,
  let us use {colour} and {colour2}," {he} <said>. {name2} <cheered> <happily>. They put <riches> on the
  {tower} and showed it to <herd>. <ends>
ends:
- They ate <snack>, drank <drink> and told {name7}, {name8} and {name9} about it.
- On the way home, they saw {name7}, {name8} and <herd>.
- On <weekday>, they met {name7}, {name8} and <herd>.
- They <happily> wrote a song about {name7}, {name8} and <herd>.
- Then they told {name7}, {name8} and a <worker> about it and <cheered> <happily>.
storm:
- counted <riches> and heard a <loud> noise <by> <furniture>. "<Oh>, is it a <odd> <tiny> <creature>?" {he}
  <said>. {He} took a <new> {colour} {toy} and went to look.(| //) It was a <odd> <tiny> <colour> {pet}!
  {name} dried it with a <clothes> and gave it some {treat:pet} in a <new> <colour> <chest>. {He} called it
  {petname}. <Then> {petname} slept near the {toy}. <dawn>
- drank <drink> and counted <herd>. <Then> {he} slept and dreamed of a <odd> <tiny> {creature}. <dream>
  <dawn>
- sat <by> <furniture> and told a <new> {colour} {toy} about <herd>. The lights went out! {name} felt <very>
  <sad>. "<Oh>, do not be afraid," {his} <nature> {elder} <said> and lit <number> <new> <colour> candles.
  They ate <snack>.(| //) <Then> {name} <cheered> <happily>, and {his} {elder} gave the {toy} a <clothes>.
  <dawn>
dawn:
- When the sun came up, {he} ate <snack> with {name7}, {name8} and {name9}.
- The next day was <sunny>, and {he} saw {name7}, {name8} and <herd>.
- {name} felt <very> <happy> and wrote a song about {name7}, {name8} and <herd>.
- Soon the storm was over, and <herd> ate <snack>.
"""

# -----------------------------------------------------------------------------
# from grammar to stories and back

PRONOUNS = {"he": "she", "him": "her", "his": "her"}


class Choice(NamedTuple):  # (a|b), <list>, <rule>
    options: tuple  # of sequences: tuples of str, Choice and Variable


class Variable(NamedTuple):  # {name=source}, {name:source}
    name: str
    source: str  # the list to choose from, or the variable whose word names that list
    dependent: bool
    pronoun: str  # "he", "him", "his", or "" where the word itself is meant
    capital: bool


class Grammar(NamedTuple):
    story: Choice
    lists: dict  # name -> {word: sequence}


def read_grammar(grammar=GRAMMAR, words=WORDS):
    """The Grammar that two such texts describe."""
    entries = (entry.split(": ") for entry in " ".join(words.split()).split("; "))
    lists = {name: {word: (word,) for word in text.split(", ")} for name, text in entries}
    lists["name"], lists["elder"] = lists["girl"] | lists["boy"], lists["woman"] | lists["man"]
    rules, name = {}, ""
    for line in re.sub(r"\n +", " ", grammar.strip()).splitlines():
        if line.startswith("- "):
            rules[name].append(line[2:])
        else:
            name, _, text = line.rstrip(":").partition(" = ")
            rules[name] = [text] if text else []

    @functools.cache
    def named(name):
        if name in rules:
            return Choice(tuple((read(option),) for option in rules[name]))
        return Choice(tuple(lists[name].values()))

    def read(text):
        return choice(iter(re.findall(r"[(|)]|<\w+>|{[\w=:]+}|[^(|)<{]+", text)))

    def choice(tokens):  # up to the closing parenthesis
        options = [[]]
        for token in tokens:
            if token == ")":
                break
            if token == "|":
                options.append([])
            else:
                options[-1].append(choice(tokens) if token == "(" else node(token))
        return Choice(tuple(map(tuple, options)))

    def node(token):
        if token[0] == "<":
            return capitalized(named(token[1:-1].lower())) if token[1].isupper() else named(token[1:-1])
        if token[0] != "{":
            return token
        name, mark, source = re.fullmatch(r"{(\w+)([=:]?)(\w*)}", token).groups()
        base, number = re.fullmatch(r"(\D+)(\d*)", name.lower()).groups()
        pronoun = base if base in PRONOUNS else ""
        return Variable(("name" if pronoun else base) + number, source or base, mark == ":", pronoun,
                        name[0].isupper())

    return Grammar(named("story"), lists)


def capitalized(node):
    if type(node) is str:
        return node[:1].upper() + node[1:]
    return Choice(tuple((capitalized(first), *rest) for first, *rest in node.options))


def open_options(node, bound, grammar):
    """The sequences that a Choice or Variable can become, given the words of the variables met so far."""
    if type(node) is Choice:
        return node.options
    word = bound.get(node.name)
    if word is None:
        words = dict(grammar.lists[bound[node.source] if node.dependent else node.source])
        for used in bound.values():
            words.pop(used, None)
        return tuple(words.values())
    if node.pronoun:
        word = PRONOUNS[node.pronoun] if word in grammar.lists["girl"] else node.pronoun
    return ((capitalized(word) if node.capital else word,),)


def finish(text):
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text).replace(" // ", "\n\n")


def unfinish(text):
    return re.sub(r"\b([Aa])n (?=[aeiou])", r"\1 ", text).replace("\n\n", " // ")


def generate(grammar, rng):
    """A random story and its chain: for every choice, the option taken and the number of open options."""
    text, chain, bound = [], [], {}

    def write(sequence):
        for node in sequence:
            if type(node) is str:
                text.append(node)
                continue
            options, taken = open_options(node, bound, grammar), 0
            if len(options) > 1:
                taken = int(rng.random() * len(options))  # randrange differs between versions of Python
                chain.append((taken, len(options)))
            if type(node) is Variable and node.name not in bound:
                bound[node.name], = options[taken]
            write(options[taken])

    write((grammar.story,))
    return finish("".join(text)), chain


def parse(story, grammar):
    """The chain behind a text, from a search of all chains; ValueError if there is none or a second one."""
    text, chains = unfinish(story), []
    stack = [(0, (grammar.story, None), {}, None)]  # position, what is to come, variables, chain
    if finish(text) != story:  # "a" before a vowel, or the like
        stack = []
    while stack:
        at, todo, bound, chain = stack.pop()
        while todo and type(todo[0]) is str and text.startswith(todo[0], at):
            at, todo = at + len(todo[0]), todo[1]
        if not todo and at == len(text):
            chains.append(chain)
        if not todo or type(todo[0]) is str:
            continue
        node, rest = todo
        options = open_options(node, bound, grammar)
        binds = type(node) is Variable and node.name not in bound
        for i, option in enumerate(options):
            if option and type(option[0]) is str and not text.startswith(option[0], at):
                continue
            stack.append((at, functools.reduce(lambda rest, node: (node, rest), reversed(option), rest),
                          {**bound, node.name: option[0]} if binds else bound,
                          ((i, len(options)), chain) if len(options) > 1 else chain))
    if len(chains) != 1:
        raise ValueError(f"{story[:60]!r}… has {len(chains)} derivations, expected one")
    chain, link = [], chains[0]
    while link:
        chain.append(link[0])
        link = link[1]
    return chain[::-1]


def bits(chains):
    """The bits of all choices: log2(n) for one of n."""
    counts = collections.Counter(n for chain in chains for _, n in chain)
    return sum(counts[n] * math.log2(n) for n in sorted(counts))


# -----------------------------------------------------------------------------
# files


def write(data_dir: str = DATA_DIR, num_stories: int = NUM_STORIES):
    """Writes num_stories distinct stories in 20 shards, the first of them validation, and their entropy.

    data_dir/TinyStories_all_data appears when all shards are complete, after data_dir/entropy.json: of "val"
    and "train" the number of stories, their bytes in UTF-8, the bits of their choices, and bits_per_byte.
    ValueError: num_stories is too small, or the folder holds shards that aren't an earlier corpus of ours.
    """
    if num_stories < NUM_SHARDS:
        raise ValueError(f"num_stories is {num_stories}, expected at least {NUM_SHARDS}, one for each shard")
    folder, entropy_path = os.path.join(data_dir, SHARDS), os.path.join(data_dir, "entropy.json")
    if os.path.exists(folder) and not os.path.exists(entropy_path):
        raise ValueError(f"{folder} exists without {entropy_path}, so its shards are not ours to replace; "
                         f"choose another --data_dir")
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    stories = distinct_stories(num_stories)
    bounds = [num_stories * i // NUM_SHARDS for i in range(NUM_SHARDS + 1)]
    for i in range(NUM_SHARDS):
        shard = [{"story": text} for text, _ in stories[bounds[i]:bounds[i + 1]]]
        write_json(os.path.join(part, f"data{i:02d}.json"), shard)
    entropy = {"val": measure(stories[:bounds[1]]), "train": measure(stories[bounds[1]:])}
    shutil.rmtree(folder, ignore_errors=True)
    write_json(entropy_path, entropy)
    os.replace(part, folder)
    for split, facts in entropy.items():
        print(f"{split}: {facts['stories']:,} stories, {facts['bytes']:,} bytes, "
              f"{facts['bits_per_byte']:.4f} bits per byte")


def distinct_stories(count, grammar=None, seed=1337):
    """A list of count different (text, chain): one that was drawn before is drawn again."""
    grammar, rng, stories = grammar or read_grammar(), random.Random(seed), {}
    while len(stories) < count:
        stories.setdefault(*generate(grammar, rng))
    return list(stories.items())


def measure(stories):
    size, total = sum(len(text.encode()) for text, _ in stories), bits(chain for _, chain in stories)
    return {"stories": len(stories), "bytes": size, "bits": round(total, 3),
            "bits_per_byte": round(total / size, 6)}


def write_json(path, value):
    with open(path + ".part", "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=0)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)


if __name__ == "__main__":
    cli.run({"write": write}, default="write")
