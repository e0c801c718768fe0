"""POPE's three splits about drawn scenes: pictures, questions and labels come from a seed, without any file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from infer_patch.errors import PatchError
from infer_patch.evals.pope import PopeTask, check_pictures, make_items
from infer_patch.evals.pope_questions import Question, unique_pairs
from infer_patch.evals.scenes import COLORS, SHAPES, Scene, make_scene
from infer_patch.evals.task import Item

_ASKED = 3  # objects that are there, and as many that are not, per picture and split
_OBJECTS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


@dataclass(frozen=True)
class PopeScenes(PopeTask):
    """Questions of the form "is there a red star in the image ?" about free scenes, the demo model's own words.

    Per scene, three objects that are there are asked about in every split, each followed by one that is not: any
    (random), the one most frequent in this set of scenes (popular), or one that shares shape or colour with the object
    asked before (adversarial). No absent object is asked about twice in one split of a scene.

    Parameters
    ----------
    scenes : int
        Number of pictures; each gives 18 rows, about 11.5 of them different pairs.
    seed : int
        Draws pictures and questions.
    suffix : str
        Follows each question; none by default.
    max_new_tokens : int
    """

    name: ClassVar[str] = "pope_scenes"
    title: ClassVar[str] = "POPE on drawn scenes: is the object in the picture?"

    scenes: int = 50
    seed: int = 0
    suffix: str = ""
    max_new_tokens: int = 8

    def items(self, processor: Any, model: Any) -> list[Item]:
        check_pictures(processor)
        drawn = _draw(self.scenes, self.seed)
        pairs = unique_pairs(_questions(drawn, self.seed))
        pictures = {name: scene.image() for name, scene in drawn.items()}
        return make_items(pairs, pictures, self.suffix)


def wording(thing: str) -> str:
    """The question about a "red star", in lower case and with a space before its mark."""
    return f"is there {'an' if thing[0] in 'aeiou' else 'a'} {thing} in the image ?"


def _draw(count: int, seed: int) -> dict[str, Scene]:
    """Scenes with at least three different objects, by the name of their picture."""
    if count < 1:
        raise PatchError(f"scenes is a number of pictures from 1 on, got {count}.")
    rng = random.Random(f"pope scenes {seed}")
    drawn: dict[str, Scene] = {}
    while len(drawn) < count:
        number = rng.randrange(2**31)
        scene = make_scene(number, layout="free")
        if len(set(scene.names)) >= _ASKED:
            drawn[f"scene_{number}"] = scene
    return drawn


def _questions(drawn: dict[str, Scene], seed: int) -> list[Question]:
    """Rows of all splits, in POPE's order: an object that is there, then one that is not, three times a scene."""
    frequency = Counter(name for scene in drawn.values() for name in set(scene.names))
    questions = []
    for image, scene in drawn.items():
        rng = random.Random(f"pope scenes {seed} {image}")
        present = sorted(set(scene.names))
        absent = [name for name in _OBJECTS if name not in present]
        rng.shuffle(absent)  # decides between equally frequent ones
        asked = rng.sample(present, _ASKED)
        others = {
            "random": rng.sample(absent, _ASKED),
            "popular": sorted(absent, key=lambda name: -frequency[name])[:_ASKED],
            "adversarial": _lookalikes(asked, absent),
        }
        for split, names in others.items():
            for there, other in zip(asked, names):
                questions.append(Question(split, image, wording(there), "yes"))
                questions.append(Question(split, image, wording(other), "no"))
    return questions


def _lookalikes(asked: Sequence[str], absent: Sequence[str]) -> list[str]:
    """Per object the first absent one, not taken yet, with the same shape or the same colour."""
    taken: list[str] = []
    for there in asked:
        parts = set(there.split())
        taken.append(next(name for name in absent if name not in taken and parts & set(name.split())))
    return taken
