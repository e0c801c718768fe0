"""Endless everyday prose from a seed: the filler of needle tests.

Grammatical sentences about fourteen places, built from templates, without a digit in them. SmolLM2-135M
reads it at perplexity 21 and a novel of Jane Austen at 24: it is neither noise nor a line repeated.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache


def items(text: str) -> list[str]:
    """Split a table of phrases at semicolons and line ends."""
    return [item.strip() for item in re.split(r"[;\n]", text) if item.strip()]


# One topic a block: place; people; things; what somebody did; what is generally true.
_TOPICS = """
at the bakery; the baker, the early customer
the brick oven; the flour bin; the bread counter; the old mixing bowl; the little bell above the door
kneaded the dough with slow and patient hands; burned a tray of almond biscuits
swept the flour from the floor; set aside a warm loaf for a neighbour
wrote the price of the plum cake on a small blackboard; tasted the rye bread
bread tastes best on the morning after it is baked; good butter makes up for many small mistakes

in the garden; the gardener, the boy from next door
the stone wall; the pear tree; the watering can; the vegetable bed; the wooden bench under the lilac
pulled weeds until the light was gone; planted a row of beans along the fence
raked the fallen leaves into a heap; picked raspberries for the afternoon; tied the roses to a new frame
found a hedgehog asleep among the leaves
a garden is never finished, only left alone for the winter; slugs have a finer taste than most people

in the harbour; the harbour master, the old fisherman
the fishing boat; the lighthouse; the rusty crane; the long pier; the ferry from the islands
mended a torn net in the shade; counted the crates of mackerel; painted the hull in a cheerful blue
watched the gulls fight over a crust of bread; coiled the wet ropes; waited for the tide to turn
the sea gives back only what it has no use for; fog makes every sailor a little more polite

in the library; the librarian, the student of history
the reading room; the oak ladder; the map cabinet; the tall window; the catalogue of rare books
returned a novel with a train ticket between its pages; looked for a book about the stars
fell asleep over a long chapter on tax law; dusted the upper shelves; copied a poem into a notebook
a good index is worth more than a handsome cover; people whisper most loudly where silence is asked for

on the train; the conductor, the woman with a violin case
the dining car; the window seat; the night train; the luggage rack; the narrow corridor
shared a bag of cherries with the other passengers; missed the connection by a minute
read the same page again; watched the fields and the villages slide past
asked politely for another blanket; wrote a letter home
every journey is shorter on the way back; a timetable is a kind of promise that nobody signs

at school; the music teacher, the new pupil
the science room; the piano; the school bus; the chalk board; the noisy playground
explained why the moon seems to follow a moving car; drew a whale across the whole page
forgot the spelling test; learned the second verse by heart; opened all the windows after the experiment
laughed at an old joke about fractions
children remember kindness far longer than grammar; a question asked twice deserves a better answer

at the market; the cheese seller, the visitor from the city
the fruit stall; the flower cart; the fountain; the set of brass scales; the striped awning
bargained over a basket of mushrooms; chose the ripest melon by its smell
dropped a jar of honey on the stones; bought goat cheese and a bunch of parsley
sold the last of the tulips; compared the price of walnuts
the best tomatoes are seldom the prettiest; whoever comes late pays less and carries less

in the mountains; the guide, the tired hiker
the wooden hut; the steep path; the frozen lake; the rope bridge; the highest ridge
filled the bottles at a cold spring; followed the marks on the rocks
counted the seconds between lightning and thunder; cooked soup on a small stove
lost a glove in the snow; reached the pass before noon
a mountain looks closest just before the longest climb; dry socks are the greatest luxury above the trees

in the kitchen; the cook, the hungry guest
the copper pot; the kitchen table; the spice drawer; the kettle; the heavy iron pan
chopped onions and tried not to cry; added a pinch of salt to the soup; peeled potatoes by the window
let the milk boil over; folded the egg whites into the batter; kept the lid on until the rice was done
hunger is an honest critic; a sharp knife is safer than a dull one

in the workshop; the carpenter, the impatient apprentice
the workbench; the lathe; the tool chest; the half finished chair; the pot of glue
sanded the table top until it felt like silk; sharpened the plane on a wet stone
cut the board a little too short; sorted the screws into old jam jars
drew the plan on the back of an envelope; fitted the drawer without a single nail
oak forgives nothing and pine forgives everything; a careful worker measures again before the cut

at the theatre; the stage manager, the nervous actor
the velvet curtain; the orchestra pit; the costume room; the painted forest; the row of dusty lamps
forgot a line and invented a better one; sewed a button on the king's coat; tuned the cello behind the scenes
practised the final bow in front of a mirror; borrowed an umbrella for the storm scene
sold the last ticket
applause is loudest when it comes as a surprise; every play is a comedy during the rehearsal

on the farm; the farmer, the animal doctor
the red barn; the tractor; the hen house; the apple orchard; the hay loft
milked the cows before breakfast; repaired the fence after the storm
carried two buckets of water to the horses; brought the sheep down from the hill
let the dog ride in the cart; looked at the clouds and shook a worried head
the weather listens to nobody; a horse knows the way home better than its rider

in the museum; the painter, the guard with a soft voice
the marble staircase; the portrait gallery; the glass case; the bronze lion; the winter landscape
stood for an hour before a small painting of a kitchen; made a sketch of the ceiling; cleaned a gilded frame
asked why nobody in the portraits ever smiles; walked from room to room without a plan
repaired a cracked vase
a picture changes with the hour of the day; colours look braver in poor light

by the river; the ferryman, the girl with a kite
the water mill; the stone bridge; the rowing boat; the willow; the muddy bank
skipped flat stones across the water; caught a trout and let it go; hung the washing between two birches
crossed to the other side to gather wild garlic; built a dam out of branches; listened to the frogs
a river is always on its way and never gone; swans are less gentle than they look
"""
_NAMES = items("""
Alice; Bruno; Clara; Daniel; Edith; Felix; Greta; Hugo; Irene; Jonas; Karin; Leo; Martha; Nora; Oscar; Paula
Quentin; Rosa; Simon; Teresa; Ulrich; Vera; Walter; Yvonne; Anton; Beatrice; Conrad; Dora; Emil; Frieda
Gilbert; Helen; Ivan; Judith; Lydia; Maurice
""")
_OPENERS = items("""
early in the morning; after a long silence; on the last warm day of autumn; before anyone could object
when the rain finally stopped; towards evening; much to everyone's surprise; in spite of the cold
a little later; while the coffee was still hot; as usual; on a quiet Sunday; once the guests had left
that same afternoon; just before the bells rang; for no particular reason; with a great deal of care
after lunch; without a word
""")
_STATES = items("""
was older than anyone cared to admit; had been repaired again and again; looked smaller than it used to
needed more attention than usual; stood where it had always stood
was the first thing that visitors noticed; had seen better days; smelled faintly of smoke and oranges
gave everybody something to talk about; was hardly used in winter; had once belonged to a famous singer
shone in the late sun; had survived two floods
""")
_MANNERS = items("""
with a smile; and thought nothing of it; in no hurry at all; and then sat down to rest; rather proudly
as though it were the easiest thing in the world; and hummed an old tune; for the first time in years
very quietly
""")
_PATTERNS = items("""
{Opener}, {who} {did}.; {Who} {did}, and {other} {did2}.; {Who} {did} {manner}.; {Thing} {state}.
{Opener}, {other} {did} {manner}.; {Who} liked to say that {truth}.
{Thing} {state}, but {who} {did} all the same.; While {who} {did}, {other} {did2}.
{Who} {did} because {thing} {state}.; Everyone {place} agreed that {truth}.
{Other} noticed that {thing} {state}.; {Opener}, somebody {place} {did}, which made {who} laugh.
Although {thing} {state}, {who} and {other} hardly ever spoke about it.
{Who} remembered the day when {other} {did}.
""")


@dataclass(frozen=True)
class _Topic:
    place: str
    people: list[str]
    things: list[str]
    actions: list[str]
    truths: list[str]


@cache
def _topics() -> list[_Topic]:
    topics = []
    for block in _TOPICS.strip().split("\n\n"):
        head, things, *actions, truths = block.split("\n")
        place, people = head.split("; ")
        topics.append(_Topic(place, people.split(", "), items(things), items("\n".join(actions)), items(truths)))
    return topics


def paragraphs(rng: random.Random) -> Iterator[list[str]]:
    """Endless paragraphs of up to eight sentences about one place; no sentence comes twice."""
    seen: set[str] = set()
    while True:
        for topic in rng.sample(_topics(), len(_topics())):
            people = [rng.choice(topic.people), *rng.sample(_NAMES, 2)]
            paragraph: list[str] = []
            for pattern in rng.sample(_PATTERNS, rng.randint(5, 8)):
                candidates = (_sentence(rng, topic, pattern, people) for _ in range(20))
                for sentence in (new for new in candidates if new not in seen):
                    seen.add(sentence)
                    paragraph.append(sentence)
                    break
            yield paragraph


def _sentence(rng: random.Random, topic: _Topic, pattern: str, people: list[str]) -> str:
    words = dict(zip(("who", "other"), rng.sample(people, 2), strict=True))
    words |= dict(zip(("did", "did2"), rng.sample(topic.actions, 2), strict=True))
    words |= {"place": topic.place, "thing": rng.choice(topic.things), "truth": rng.choice(topic.truths)}
    for name, phrases in (("state", _STATES), ("manner", _MANNERS), ("opener", _OPENERS)):
        words[name] = rng.choice(phrases)
    words |= {name.capitalize(): phrase[0].upper() + phrase[1:] for name, phrase in words.items()}
    return pattern.format(**words)
