"""Words that the keys and values of RULER's needles are made of."""

import re

# No adjective ends like another one and no noun begins like another one: no pair is part of another pair.
ADJECTIVES = re.findall(
    "[a-z]+",
    """
amber ancient arctic bitter blank blunt bold brave brief bright brisk broad bronze calm careful cheerful chilly clever
clumsy coastal cosy crimson crisp curious curly daring dense dim distant double drowsy dusty eager early elegant empty
faint famous fancy fearless fierce flat fluffy foggy formal fragile frank fresh frosty gentle giant gilded glad gloomy
golden graceful grand grassy hasty heavy hidden hollow honest huge humble hungry icy idle jolly keen kind lazy light
lively lonely loud loyal lucky marble meek mellow merry mighty misty modest mossy muddy narrow neat nimble noble odd
pale patient plain playful polite proud purple quaint quick quiet rapid rare rich rigid ripe rough round royal rusty
salty scarlet secret shallow sharp shiny silent silver simple sleepy slow smooth sober soft solid spare stable steep
stern sticky stout strange sturdy subtle sudden sunny sweet swift tame tender thick thin tidy tiny tough tranquil upper
urban vague vast velvet violet vivid warm weary wild windy wise witty wooden yellow young zealous
""",
)
NOUNS = re.findall(
    "[a-z]+",
    """
acorn anchor apron arrow attic badger banjo barrel basket beacon blanket bonnet bottle bramble bridge bucket button
cabin candle canyon carpet castle cello chimney cider clover coral cottage cradle crystal curtain daisy dolphin donkey
drum eagle elbow engine falcon feather fiddle finch flute forest fountain galaxy garden gazelle geyser ginger glacier
goblet goose gravel guitar hammer harbour hazel hedge helmet heron hill hornet island ivory jacket jasmine jewel kettle
kitten ladder lagoon lantern lemon lily lizard magnet maple meadow melon mirror mitten monsoon mountain muffin napkin
nettle nutmeg oasis ocean olive orchard otter oyster paddle palace panda parrot pebble pencil pepper pigeon pillow
planet plum pocket pond poppy puzzle quarry quilt rabbit raven ribbon river rocket saddle salmon sandal scarf shadow
shovel sparrow spoon squirrel stone swan teapot temple thistle thunder ticket tiger timber tractor trumpet tulip tunnel
turnip umbrella valley vase violin volcano waffle wagon walnut walrus whale whistle willow window wizard yacht zebra
""",
)
