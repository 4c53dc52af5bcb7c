"""The built-in demo corpus: little stories from a grammar that knows its own entropy.

    python stories.py --data_dir data

writes data/TinyStories_all_data/data00.json (validation), data01.json ... (train), each a JSON array of
{"story": text} as TinyStories has it, and data/entropy.json: how many bits the choices behind each split hold.

A story is a chain of choices, each uniform among the options that are open at that point and each visible in the
text where it is made. No two chains give the same text (`parse` recovers the chain, and finds out if there are
several), so the probability of a text is that of its chain, and the bits of the choices, divided by the bytes of
the text, are the least bits per byte that any model can reach on average.

How to read the grammar: a rule is a name and its options, one per dash, and stories are what `story` can become.

    (ran|walked)     one of these
    <happy>          one of the words, or options, of that name, every time anew
    {toy}            where first met, one of the words of that name not used in the story so far; later the same
    {toy2}           another one of them
    {name=girl}      the same, chosen from the words named girl
    {spot=place}     the same, chosen from the words that are named as this story's {place} is
    {he} {his2}      pronoun of {name}, of {name2}; a capital letter, as in {He}, is kept
    //               a new paragraph

"a" becomes "an" before a vowel.
"""

import functools
import json
import math
import os
import random
import re
from typing import NamedTuple

import cli

# ---------------------------------------------------------------- words

WORDS = {
    "girl": "Lily, Anna, Mia, Ella, Rose, Lucy, Amy, Sara, Molly, Emma, Grace, Zoe, Ruby, Nora, Kate, Jane, Sue, "
            "Daisy, Ivy, Clara, Alice, Maya, Eva, Tina, Poppy, Hannah, Julia, Betty, Fiona, Leah, Nina, Olive",
    "boy": "George, Tom, Ben, Sam, Max, Tim, Jack, Leo, Adam, Finn, Oscar, Henry, Noah, Luke, Peter, Billy, Dan, "
           "Eli, Fred, Hugo, Jake, Kevin, Liam, Mark, Nick, Owen, Paul, Ravi, Sid, Theo, Felix, Zack",
    "elder": "mom, dad, grandma, grandpa, aunt, uncle, big sister, big brother",
    "nature": "kind, little, clever, brave, shy, cheerful, curious, gentle, quiet, funny, smart, friendly, playful, "
              "polite, lively, careful",
    "hobby": "painting, singing, dancing, reading, swimming, climbing trees, riding bikes, flying kites, baking bread, "
             "picking flowers, feeding ducks, collecting shells, telling jokes, chasing butterflies, making masks, "
             "building towers, drawing animals, jumping in puddles, playing chess, cooking soup, watching birds, "
             "looking at stars, catching frogs, skipping rope, planting beans, solving puzzles, playing tag, "
             "digging holes, counting clouds, sailing paper boats, rolling down hills, beating drums",
    "colour": "red, blue, green, yellow, orange, purple, pink, brown, white, black, gray, silver, golden, striped, "
              "spotted, shiny",
    "toy": "ball, doll, drum, robot, kite, puppet, whistle, flute, yo-yo, hoop, bucket, wagon, scooter, toy train, "
           "toy truck, toy boat, toy plane, toy rocket, toy horse, toy bus, toy dinosaur, teddy bear, stuffed bunny, "
           "spinning top, jump rope, magic wand, paper crown, rag doll, beach ball, wooden duck, rubber frog, music box",
    "garment": "hat, coat, scarf, sweater, jacket, cap, shirt, raincoat, cape, vest",
    "footwear": "boots, shoes, socks, sandals, slippers, mittens",
    "furniture": "bed, sofa, table, chair, desk, piano, cupboard, bookcase, bench, stove, armchair, bathtub, dresser, "
                 "rocking chair, wardrobe, lamp",
    "room": "kitchen, attic, cellar, garage, hallway, bathroom, bedroom, barn, yard, shed, playroom, pantry",
    "sunny": "sunny, warm, windy, cool, bright, cloudy, quiet, misty, breezy, fine, lovely, mild, clear, fresh, calm, "
             "beautiful",
    "weekday": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "morning": "morning, day, afternoon",
    "number": "two, three, four, five, six, seven, eight, nine, ten, twelve",
    "little": "little, small, quiet, tiny, pretty, lonely, sleepy, busy, faraway, snowy, sunny, merry",
    "village": "village, town, valley, city, cottage, farmhouse",
    "sea": "sea, river, lake, woods, mountains, mill, railway, harbor, castle, desert, forest, church",
    "place": "park, beach, farm, forest, garden, playground, lake, zoo, market, meadow, schoolyard, orchard",
    "park": "bench, fountain, slide, swing, oak tree, statue, bridge, flower bed",
    "beach": "rowboat, umbrella, lighthouse, sand dune, palm tree, sandcastle, tide pool, flagpole",
    "farm": "barn, tractor, haystack, henhouse, well, wagon, gate, pigpen",
    "forest": "log, stump, pine tree, stream, boulder, cave, bramble bush, footbridge",
    "garden": "shed, rose bush, hedge, gate, wheelbarrow, pond, birdbath, apple tree",
    "playground": "slide, swings, sandbox, seesaw, climbing frame, bench, fence, merry-go-round",
    "lake": "dock, willow tree, reeds, canoe, boathouse, picnic table, bridge, campfire",
    "zoo": "ticket booth, monkey house, penguin pool, duck pond, snack bar, elephant house, fountain, lion cage",
    "market": "fruit stand, flower stall, bakery, clock tower, well, church, fountain, bus stop",
    "meadow": "maple tree, creek, fence, windmill, beehive, scarecrow, stone wall, wooden cart",
    "schoolyard": "flagpole, bike rack, fence, front steps, bench, chestnut tree, sandpit, school bus",
    "orchard": "pear tree, cherry tree, ladder, beehive, fence, wooden cart, plum tree, stone wall",
    "pet": "kitten, puppy, rabbit, squirrel, duckling, mouse, hedgehog, lamb, fox cub, sparrow, turtle, robin, piglet, "
           "chick, raccoon, gosling, fawn, pigeon, hamster, crow, chipmunk, otter, goat, monkey",
    "kitten": "milk, fish, chicken, cream", "puppy": "meat, milk, rice, sausages",
    "rabbit": "carrots, lettuce, clover, cabbage", "squirrel": "nuts, acorns, seeds, pine cones",
    "duckling": "corn, peas, oats, lettuce", "mouse": "cheese, crumbs, rice, oats",
    "hedgehog": "berries, worms, beetles, melon", "lamb": "hay, grass, clover, milk",
    "fox cub": "eggs, chicken, berries, meat", "sparrow": "seeds, worms, crumbs, millet",
    "turtle": "lettuce, berries, dandelions, cucumber", "robin": "worms, berries, seeds, crumbs",
    "piglet": "corn, potatoes, acorns, apples", "chick": "corn, seeds, oats, crumbs",
    "raccoon": "fish, berries, corn, nuts", "gosling": "grass, oats, clover, peas",
    "fawn": "leaves, grass, acorns, clover", "pigeon": "corn, seeds, peas, crumbs",
    "hamster": "seeds, nuts, carrots, oats", "crow": "corn, nuts, seeds, worms",
    "chipmunk": "nuts, acorns, seeds, berries", "otter": "fish, crabs, shrimp, clams",
    "goat": "hay, leaves, grass, carrots", "monkey": "bananas, nuts, figs, mangoes",
    "creature": "dragon, whale, elephant, lion, tiger, bear, giant, wizard, knight, pirate, mermaid, snail, spider, owl, "
                "camel, penguin, dolphin, donkey, bee, crab, parrot, mole, king, queen, clown, dinosaur, zebra, giraffe, "
                "kangaroo, hippo, seal, swan, peacock, panda, koala, ghost, sailor, farmer, troll, shark",
    "odd": "tiny, huge, lazy, hungry, sleepy, silly, grumpy, brave, lonely, clever, polite, proud, greedy, noisy, shy, "
           "magic, jolly, old, young, friendly, sneaky, dizzy, lucky, fearless",
    "dancing": "dancing, singing, sleeping, skating, swimming, flying, laughing, baking cakes, playing cards, "
               "drinking tea, marching, sailing, juggling, reading books, painting, racing",
    "moon": "on the moon, in the clouds, under the sea, on a rainbow, in a castle, on an island, in the snow, on a train, "
            "in the desert, at a party, on the roof, in a teapot, in the jungle, on a mountain, at school, in a boat",
    "food": "apples, pears, plums, grapes, cherries, peaches, oranges, bananas, carrots, sandwiches, cookies, muffins, "
            "cheese, bread, nuts, raisins, crackers, pancakes, eggs, strawberries, pretzels, tomatoes, popcorn, waffles, "
            "buns, biscuits, pies, noodles, tarts, melons, blueberries, sausages",
    "topping": "cherries, raisins, nuts, honey, lemon, apples, cinnamon, chocolate, blueberries, coconut, bananas, jam, "
               "pumpkin, ginger, plums, carrots",
    "cake": "cake, pie, pudding, loaf of bread, tart, batch of cookies, tray of muffins, pile of pancakes",
    "bowl": "bowl, pan, pot, jug, bucket, basin", "flour": "flour, sugar, butter, eggs, milk, salt, cream, oats",
    "plant": "bean, pumpkin, tomato, sunflower, melon, pea, daisy, poppy, carrot, strawberry, rose, tulip, cucumber, "
             "pepper, radish, cabbage",
    "pot": "pot, can, jar, cup, box, bowl, tub, boot",
    "skill": "swim, whistle, juggle, skate, ski, knit, sew, read, ride a bike, ride a horse, play the piano, row a boat, "
             "play the violin, tie a bow, stand on one hand, climb a rope, do a cartwheel, catch a ball, write a poem, "
             "bake bread, fly a kite, jump rope, paint a face, count to a hundred, tell time, dance, dive, fish, "
             "play chess, fold a paper bird, spin a top, sing in tune",
    "fragile": "cup, vase, plate, bowl, lamp, clock, teapot, mirror, jar, jug, glass bird, flowerpot, candle holder, "
               "music box, picture frame, snow globe",
    "fear": "the dark, thunder, spiders, big dogs, deep water, loud noises, high places, bees, ghosts, the dentist, "
            "strangers, snakes, bats, the old cellar, crowds, shots",
    "gift": "card, necklace, picture, crown, paper flower, bookmark, puppet, basket, mask, song book, kite, bracelet",
    "stuff": "paper, string, buttons, beads, ribbon, feathers, shells, glitter, leaves, wool, cloth, sticks, pebbles, "
             "acorns, glue, foil",
    "treasure": "coins, shells, marbles, rings, stamps, pearls, beads, letters, buttons, stones, medals, keys, candies, "
                "photographs, spoons, feathers",
    "tower": "sandcastle, tree house, fort, snowman, tower, raft, tent, bridge, birdhouse, scarecrow, playhouse, "
             "go-cart, rocket, stage, boat, windmill",
    "tool": "shovel, hammer, rope, ladder, saw, basket, wheelbarrow, bucket, paintbrush, blanket, net, rake",
    "happy": "happy, glad, proud, cheerful, pleased, merry, thankful, joyful, delighted, excited",
    "sad": "sad, lonely, sorry, upset, unhappy, gloomy, hurt, left out, ashamed, worried",
    "sadly": "sadly, quietly, softly, slowly, in a small voice, with tears in {his} eyes",
    "softly": "softly, gently, kindly, calmly, warmly, quietly, with a smile, with a wink",
    "loud": "loud, soft, strange, sad, squeaky, tiny, funny, odd, faint, sudden",
    "wet": "wet, dusty, muddy, dirty, sandy, cold, sticky, covered in leaves, full of dirt, a bit bent",
    "big": "big, tall, long, heavy, wide, huge, giant, enormous",
    "nice": "nice, kind, sweet, fine, good, lovely, great, wonderful",
}

# ---------------------------------------------------------------- grammar

GRAMMAR = """
story:
- Once upon a time,(| in a <little> <village> (by|near) the <sea>,) there (was|lived) a <kid>. <about> <later>
- One day, (a <kid> <solo>|{name} <solo>|{name} and {name2} <duo>)
- {name} and {name2} were best friends. <both> <when>, (they|the (two friends|children)) <duo>
- On a dark and stormy night, <storm>
- {name} was <number> years old and (loved|liked|enjoyed) {hobby}(| and {hobby2}). <about> <later>
- In a <little> <village> (by|near) the <sea>, there (was|lived) a <kid>. <about> <later>
kid:
- <nature> (girl named {name=girl}|boy named {name=boy})
later:
- <when>, ({he} <solo>|{name} <solo>|{he} and {his} (friend|cousin|neighbor|classmate) {name2} <duo>)
when:
- One <sunny> <morning>
- On a <sunny> <weekday> <morning>
- Early one <sunny> <morning>
- One <weekday>
- One day
about:
- {He} always wore a {wear=colour} <garment> and {wear2=colour} <footwear>.
- {He} had <number> <odd> <pet>s and a <odd> {creature}.
both:
- They (both|always) (liked|loved) {hobby} and {hobby2}.
solo:
- lost {his} {colour} {toy}. {He} looked (under|behind|beside) the {furniture}.
duo:
- went to the {place}. {name} saw {name2} near the {spot=place}.
storm:
- {name} heard a <loud> noise.
"""
