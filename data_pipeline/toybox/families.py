"""Which emoji are the same thing: nouns and group words from names, families from names and picture hashes, splits.

Used by the archive builder only. Merging too much costs a few held-out subjects; merging too little would leak them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import cv2
import numpy as np

GROUPS = {
    "Animals & Nature": "Animals",
    "Food & Drink": "Food",
    "Travel & Places": "Travel",
    "Activities": "Activities",
    "Objects": "Objects",
}
_TAIL = re.compile(
    r" (with|of|showing|behind|in|on|over|to|without|from|tilted|left|right|face|low|medium|high|volume)\b.*"
)
_NOUN_BY_PATTERN = (
    (re.compile(r"o’clock|-thirty"), "clock"),
    (re.compile(r"\bmoon\b(?! cake| viewing)"), "moon"),
    (re.compile(r"dog|poodle"), "dog"),
    (re.compile(r"\bcat\b"), "cat"),
    (re.compile(r"\bbook|notebook|ledger"), "book"),
    (re.compile(r"mailbox|postbox"), "mailbox"),
    (re.compile(r"chick\b"), "chick"),
    (re.compile(r"\bsun\b"), "sun"),
    (re.compile(r"yen$|banknote"), "banknote"),
    (re.compile(r"train$|railway car|locomotive|metro|light rail|tram|monorail"), "train"),
    (re.compile(r"automobile|taxi|police car$|utility vehicle|racing car"), "car"),
    (re.compile(r"house$|houses|hut"), "house"),
    (re.compile(r"rabbit"), "rabbit"),
    (re.compile(r"\bpig\b|\bboar\b"), "pig"),
    (re.compile(r"shoe$|boot$|sandal|skate$"), "shoe"),
)
_GROUP_WORDS = {  # group word -> patterns of names, first match wins
    "plant": (
        r"bouquet|blossom|flower|lotus|rosette|rose\b|hibiscus|tulip|hyacinth|seedling|plant|tree|cactus|sheaf|"
        r"herb|shamrock|clover|leaf|mushroom|coral|decoration"
    ),
    "fruit": (
        r"grapes|melon|tangerine|lemon|banana|pineapple|mango|apple|pear|peach|cherries|strawberry|blueberries|"
        r"kiwi|coconut|avocado|olive|tomato"
    ),
    "vegetable": (
        r"eggplant|potato|carrot|ear of corn|pepper|cucumber|leafy|broccoli|garlic|onion|beans|pea pod|ginger"
    ),
    "drink": (
        r"milk|beverage|teapot|teacup|sake|bottle|glass\b|cocktail|tropical drink|beer|"
        r"glasses\b(?<=clinking glasses)|liquid|cup with straw|bubble tea|mate"
    ),
    "vehicle": (
        r"train|locomotive|car\b|rail\b|metro|tram|bus|ambulance|engine|taxi|automobile|vehicle|truck|lorry|"
        r"tractor|motor|wheelchair|rickshaw|bicycle|scooter|skateboard|sailboat|canoe|boat|ship|ferry|airplane|"
        r"helicopter|rocket|saucer|railway|cableway|tramway|monorail"
    ),
    "building": (
        r"stadium|building|house|hut|office|hospital|bank$|hotel|store|school|factory|castle|wedding|tower|"
        r"church|mosque|temple|synagogue|shrine|kaaba|tent|station"
    ),
    "clock": (r"clock|thirty|watch|hourglass"),
    "garment": (
        r"coat|vest|necktie|shirt|jeans|scarf|gloves|socks|dress|kimono|sari|swimsuit|briefs|shorts|bikini|"
        r"clothes|shoe|boot|sandal|hat$|cap$|helmet|crown|uniform"
    ),
    "instrument": (r"saxophone|trumpet|accordion|guitar|keyboard|violin|banjo|drum|maracas|flute|horn$|trombone|harp"),
    "tool": (
        r"hammer|axe|pick|saw|wrench|screwdriver|clamp|scissors|ruler|broom|shovel|plunger|ladder|knife|fork|"
        r"spoon|chopsticks|magnet|pencil|pen$|paintbrush|crayon|brush"
    ),
    "ball": (r"ball$|yo-yo|yarn"),
    "toy": (r"teddy|puzzle|kite|doll|piñata|balloon|die$|joystick|video game|pistol|magic wand|chess"),
}
_DEFAULT_WORD = {"Animals": "animal", "Food": "food item"}


def noun_of(name: str) -> str:
    """Head noun of an emoji's name: "guide dog" -> "dog"."""
    name = name.replace("'", "’")
    for pattern, noun in _NOUN_BY_PATTERN:
        if pattern.search(name):
            return noun
    head = _TAIL.sub("", name).strip() or name
    return head.split()[-1].lower()


def group_word_of(name: str, group: str) -> str:
    """The word that may stand for the noun: animal, fruit, vehicle, toy, thing …"""
    for word, pattern in _GROUP_WORDS.items():
        if re.search(pattern, name) and not (group == "Animals" and word not in ("plant",)):
            return word
    return _DEFAULT_WORD.get(group, "thing")


def picture_hash(rgba: np.ndarray) -> np.ndarray:
    """Outline and coarse colour of a cut-out as 320 numbers in 0..1, for telling near-duplicates."""
    picture = rgba.astype(np.float32) / 255
    premultiplied = picture[..., :3] * picture[..., 3:] + 0.5 * (1 - picture[..., 3:])
    outline = cv2.resize(picture[..., 3], (8, 8), interpolation=cv2.INTER_AREA)
    colour = cv2.resize(premultiplied, (8, 8), interpolation=cv2.INTER_AREA)
    return np.concatenate([outline.ravel(), colour.ravel()])


def families(names: Sequence[str], hashes: Sequence[np.ndarray], *, threshold: float = 0.045) -> list[str]:
    """A family name for each emoji: union of equal nouns and of near pictures (mean hash distance < `threshold`)."""
    parent = list(range(len(names)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_of: dict[str, int] = {}
    for index, name in enumerate(names):
        parent[root(index)] = root(first_of.setdefault(noun_of(name), index))
    stacked = np.stack(hashes)
    for index in range(len(names)):
        near = np.abs(stacked[:index] - stacked[index]).mean(axis=1) < threshold
        for other in np.flatnonzero(near):
            parent[root(index)] = root(int(other))
    return [noun_of(names[root(index)]) for index in range(len(names))]


def split_of(family: str) -> str:
    """train, val (5 %) or heldout (10 %), by a hash of the family's name."""
    share = int.from_bytes(hashlib.sha256(f"toybox {family}".encode()).digest()[:4], "big") / 2**32
    return "heldout" if share < 0.10 else "val" if share < 0.15 else "train"
