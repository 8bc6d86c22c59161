# SPDX-License-Identifier: Apache-2.0
"""Draw seeded scenes of coloured shapes and printed signs, and ask PaliGemma's questions about them.

Knows no model: numpy and Pillow in, pictures with questions and true answers out. The tiny
checkpoint is trained, calibrated and tested on the three disjoint splits of this generator.

>>> scene = draw("test", 0)
>>> scene.image.size
(224, 224)
>>> [q.prompt for q in ask(scene, seed=0) if q.task == "caption"]
['caption en']
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 224  # pixels a side; the processor resizes it to the model's resolution
SPLITS = {"train": 0, "calibration": 1, "test": 2}
TASKS = ("caption", "ocr", "answer", "detect", "segment")

# Centre of each colour in HSV (hue in degrees, saturation,
# value); jittered by less than half the distance to a neighbour.
COLOURS = {
    "red": (0, 0.9, 0.85),
    "orange": (30, 0.95, 1.0),
    "yellow": (56, 0.9, 1.0),
    "green": (120, 0.8, 0.65),
    "cyan": (180, 0.8, 0.9),
    "blue": (225, 0.9, 0.85),
    "purple": (275, 0.75, 0.7),
    "pink": (325, 0.5, 1.0),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DIAMETERS = {"small": (34.0, 50.0), "large": (72.0, 104.0)}  # pixels; nothing lies between, so that the word is decidable
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ23456789"  # without the pairs nobody can tell apart: 0 O Q, 1 I
FONTS = ("regular", "bold", "slanted", "pixel")
_OVERSAMPLE = 2


@dataclass(frozen=True)
class Thing:
    """A shape in a scene: its words, and its outline in pixels of the scene."""

    shape: str
    colour: str
    size: str
    outline: np.ndarray  # [N, 2] x, y
    hole: np.ndarray | None  # [N, 2], the inside of a ring

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """y1, x1, y2, x2 in pixels, clipped to the scene."""
        (x1, y1), (x2, y2) = self.outline.min(0).clip(0, SIZE), self.outline.max(0).clip(0, SIZE)
        return float(y1), float(x1), float(y2), float(x2)

    @property
    def centre(self) -> tuple[float, float]:
        """y, x in pixels."""
        y1, x1, y2, x2 = self.box
        return (y1 + y2) / 2, (x1 + x2) / 2

    def mask(self) -> np.ndarray:
        """The pixels it covers: bool [SIZE, SIZE]."""
        return self._raster((0.0, 0.0, float(SIZE), float(SIZE)), SIZE) > 127

    def crop_mask(self, side: int = 64) -> np.ndarray:
        """The thing inside its own box, stretched to a square: float32 [side, side] in 0..1."""
        return (self._raster(self.box, side) / np.float32(255)).astype(np.float32)

    def _raster(self, box: tuple[float, float, float, float], side: int) -> np.ndarray:
        y1, x1, y2, x2 = box
        scale = np.array([4 * side / (x2 - x1), 4 * side / (y2 - y1)])
        canvas = Image.new("L", (4 * side, 4 * side))
        pen = ImageDraw.Draw(canvas)
        for points, fill in ((self.outline, 255), (self.hole, 0)):
            if points is not None:
                pen.polygon(_points((points - [x1, y1]) * scale), fill=fill)
        return np.asarray(canvas.reduce(4))


@dataclass(frozen=True)
class Sign:
    """Printed characters: the text, and the box of each character and of the plate in pixels (y1, x1, y2, x2)."""

    text: str
    box: tuple[float, float, float, float]
    characters: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    image: Image.Image  # RGB, SIZE × SIZE
    things: tuple[Thing, ...]  # from left to right
    sign: Sign | None


@dataclass(frozen=True)
class Question:
    """A prompt and what is true: an answer in words, or the things that the boxes and masks must name, in order."""

    task: str
    prompt: str
    answer: str | None = None
    things: tuple[tuple[str, Thing], ...] = ()  # label and thing


def draw(split: str, index: int) -> Scene:
    """Draw scene number `index` of a split; the same numbers give the same pixels.

    Raises:
        KeyError: if the split is not one of `SPLITS`.
    """
    rng = np.random.default_rng([SPLITS[split], index])
    while True:
        scene = _try_scene(rng)
        if scene is not None:
            return scene


def ask(scene: Scene, seed: int) -> list[Question]:
    """Every kind of question that this scene can answer, one of each, in random wording order."""
    rng = np.random.default_rng([7, seed])
    questions = [Question("caption", "caption en", caption(scene))]
    if scene.sign:
        questions.append(Question("ocr", "ocr", scene.sign.text))
    questions += _answers(scene, rng)
    questions.append(_detect(scene, rng))
    thing = _pick(rng, [t for t in scene.things if _count(scene, t.name) == 1])
    if thing:
        label = thing.shape if _count(scene, thing.shape) == 1 and rng.random() < 0.4 else thing.name
        questions.append(Question("segment", f"segment {label}", things=((label, thing),)))
    return questions


def caption(scene: Scene) -> str:
    """The things from left to right, in words."""
    names = [f"{'an' if t.name[0] in 'aeiou' else 'a'} {t.name}" for t in scene.things]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def locations(box: tuple[float, float, float, float], size: float = SIZE) -> str:
    """A box (y1, x1, y2, x2 in pixels) as four `<loc>` tokens, in 1024 bins of the picture's side.

    >>> locations((0, 56, 112, 224))
    '<loc0000><loc0256><loc0512><loc1023>'
    """
    return "".join(f"<loc{min(1023, round(v / size * 1024)):04d}>" for v in box)


# What is asked ----------------------------------------------------------------------------------------------


def _answers(scene: Scene, rng: np.random.Generator) -> list[Question]:
    things, found = scene.things, []

    def add(question: str, answer: str) -> None:
        found.append(Question("answer", f"answer en {question} ?", answer))

    if thing := _pick(rng, [t for t in things if _count(scene, t.shape) == 1]):
        add(f"what color is the {thing.shape}", thing.colour)
    if thing := _pick(rng, [t for t in things if _count(scene, t.colour) == 1]):
        add(f"what shape is the {thing.colour} thing", thing.shape)
    if thing := _pick(rng, [t for t in things if _count(scene, t.name) == 1]):
        add(f"what size is the {thing.name}", thing.size)
    clear = [t for t in things if _count(scene, t.name) == 1 and min(abs(v - SIZE / 2) for v in t.centre) > 10]
    if thing := _pick(rng, clear):
        y, x = thing.centre
        add(f"where is the {thing.name}", f"{'top' if y < SIZE / 2 else 'bottom'} {'left' if x < SIZE / 2 else 'right'}")

    word = _pick(rng, sorted({t.shape for t in things}) if rng.random() < 0.8 else SHAPES)
    kind = rng.integers(3)
    if kind == 0:
        add("how many things are there", str(len(things)))
    elif kind == 1:
        add(f"how many {word}s are there" if word != "cross" else "how many crosses are there", str(_count(scene, word)))
    else:
        colour = _pick(rng, sorted({t.colour for t in things}) if rng.random() < 0.8 else list(COLOURS))
        add(f"how many {colour} things are there", str(_count(scene, colour)))

    # Half of the answers are no, and half of those name the colour of one thing and the shape of another.
    name = _pick(rng, things).name
    while rng.random() < 0.5:
        shape, colour = _pick(rng, SHAPES), _pick(rng, list(COLOURS))
        if rng.random() < 0.5:
            shape, colour = (_pick(rng, things).shape, colour) if rng.random() < 0.5 else (shape, _pick(rng, things).colour)
        name = f"{colour} {shape}"
        if not _count(scene, name):
            break
    add(f"is there {'an' if name[0] in 'aeiou' else 'a'} {name}", "yes" if _count(scene, name) else "no")
    return found


def _detect(scene: Scene, rng: np.random.Generator) -> Question:
    words = []
    for index in rng.permutation(len(scene.things))[: 1 + (rng.random() < 0.4)]:
        thing = scene.things[index]
        word = thing.shape if rng.random() < 0.4 else thing.name
        if word not in words:
            words.append(word)
    targets = tuple((word, t) for word in words for t in scene.things if _is(t, word))
    return Question("detect", f"detect {' ; '.join(words)}", things=targets)


def _is(thing: Thing, word: str) -> bool:
    return word in (thing.shape, thing.colour, thing.name)


def _count(scene: Scene, word: str) -> int:
    return sum(_is(t, word) for t in scene.things)


def _pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))] if options else None


# What is drawn ----------------------------------------------------------------------------------------------


def _try_scene(rng: np.random.Generator) -> Scene | None:
    taken: list[tuple[float, float, float, float]] = []
    sign = _sign(rng) if rng.random() < 0.6 else None
    if sign:
        taken.append(sign[0].box)
    things: list[Thing] = []
    for _ in range(rng.choice(4, p=[0.25, 0.3, 0.25, 0.2]) + 1):
        for _ in range(30):
            thing = _thing(rng)
            y1, x1, y2, x2 = box = thing.box
            free = all(y2 + 4 < b[0] or b[2] + 4 < y1 or x2 + 4 < b[1] or b[3] + 4 < x1 for b in taken)
            # Captions name things from left to right, so no two may stand exactly above each other.
            if free and all(abs(thing.centre[1] - t.centre[1]) > 12 for t in things):
                taken.append(box)
                things.append(thing)
                break
        else:
            return None
    things.sort(key=lambda t: t.centre[1])

    canvas = _background(rng)
    for thing in things:
        _paint(canvas, thing, rng)
    if sign:
        plate = sign[1]
        canvas.paste(plate, (int(sign[0].box[1] * _OVERSAMPLE), int(sign[0].box[0] * _OVERSAMPLE)), plate)
    pixels = np.asarray(canvas.reduce(_OVERSAMPLE), np.float32)
    pixels = pixels + rng.normal(0, rng.uniform(0, 9), (SIZE, SIZE, 1)).astype(np.float32)
    return Scene(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), tuple(things), sign[0] if sign else None)


def _background(rng: np.random.Generator) -> Image.Image:
    """A soft gradient of two dull colours with thin lines and dots as clutter, oversampled."""
    side = SIZE * _OVERSAMPLE
    corners = [_hsv(rng.uniform(0, 360), rng.uniform(0, 0.25), v) for v in rng.uniform(0.25, 0.95) + rng.uniform(-0.15, 0.15, 4)]
    canvas = Image.fromarray(np.array(corners, np.uint8).reshape(2, 2, 3)).resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(0, 9)):
        (x1, y1, x2, y2), grey = rng.uniform(0, side, 4), _hsv(rng.uniform(0, 360), rng.uniform(0, 0.3), rng.uniform(0.2, 1))
        if rng.random() < 0.5:
            pen.line((x1, y1, x2, y2), grey, int(rng.integers(1, 4)))
        else:
            pen.ellipse((x1, y1, x1 + 8, y1 + 8), grey)
    return canvas


def _thing(rng: np.random.Generator) -> Thing:
    shape, colour, size = _pick(rng, SHAPES), _pick(rng, list(COLOURS)), _pick(rng, list(DIAMETERS))
    diameter = rng.uniform(*DIAMETERS[size])
    stretch = rng.uniform(0.85, 1.0, 2)
    turn = np.radians(rng.uniform(-22, 22))
    outline = _unit_shape(shape) @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline = outline / np.ptp(outline, axis=0).max() * diameter * stretch
    half = np.ptp(outline, axis=0) / 2
    middle = rng.uniform(half + 2, SIZE - half - 2)
    outline += middle - (outline.max(0) + outline.min(0)) / 2
    hole = None
    if shape == "ring":
        centre = outline.mean(0)
        hole = (outline - centre) * rng.uniform(0.45, 0.6) + centre
    return Thing(shape, colour, size, outline, hole)


@cache
def _unit_shape(shape: str) -> np.ndarray:
    """Outline points [N, 2] around the origin; which size does not matter."""
    if shape in ("circle", "ring"):
        angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    if shape == "square":
        return np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]])
    if shape == "triangle":
        return np.array([[0.0, -1], [1, 0.8], [-1, 0.8]])
    if shape == "cross":
        a = 0.34
        return np.array(
            [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]]
        )
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], 1)


def _paint(canvas: Image.Image, thing: Thing, rng: np.random.Generator) -> None:
    hue, saturation, value = COLOURS[thing.colour]
    fill = _hsv(hue + rng.uniform(-9, 9), saturation + rng.uniform(-0.1, 0.05), value + rng.uniform(-0.1, 0.0))
    if thing.hole is None:
        ImageDraw.Draw(canvas).polygon(_points(thing.outline * _OVERSAMPLE), fill)
        return
    stencil = Image.new("L", canvas.size)
    pen = ImageDraw.Draw(stencil)
    pen.polygon(_points(thing.outline * _OVERSAMPLE), 255)
    pen.polygon(_points(thing.hole * _OVERSAMPLE), 0)
    canvas.paste(fill, (0, 0), stencil)


def _sign(rng: np.random.Generator) -> tuple[Sign, Image.Image]:
    """Characters on a plate, and the plate's picture (RGBA, oversampled)."""
    text = "".join(_pick(rng, LETTERS) for _ in range(rng.integers(2, 5)))
    height, font = rng.uniform(26, 40) * _OVERSAMPLE, _pick(rng, FONTS)
    light, dark = _hsv(rng.uniform(0, 360), 0.1, rng.uniform(0.85, 1)), _hsv(rng.uniform(0, 360), 0.5, rng.uniform(0.05, 0.3))
    ink, paper = (dark, light) if rng.random() < 0.7 else (light, dark)
    glyphs = [_glyph(character, font, round(height)) for character in text]
    gap, margin = round(height * rng.uniform(0.08, 0.2)), round(height * 0.25)
    width = sum(g.width for g in glyphs) + gap * (len(glyphs) - 1) + 2 * margin
    plate = Image.new("RGBA", (width, glyphs[0].height + 2 * margin))
    ImageDraw.Draw(plate).rounded_rectangle((0, 0, width - 1, plate.height - 1), margin // 2, paper)
    room = np.array([SIZE * _OVERSAMPLE - plate.height - 4, SIZE * _OVERSAMPLE - width - 4])
    top, left = (int(v) for v in rng.integers(4, np.maximum(room, 5)))
    x, characters = margin, []
    for glyph in glyphs:
        plate.paste(ink, (x, margin), glyph)
        box = (top + margin, left + x, top + margin + glyph.height, left + x + glyph.width)
        characters.append(_reduced(*box))
        x += glyph.width + gap
    return Sign(text, _reduced(top, left, top + plate.height, left + width), tuple(characters)), plate


def _reduced(y1: int, x1: int, y2: int, x2: int) -> tuple[float, float, float, float]:
    return y1 / _OVERSAMPLE, x1 / _OVERSAMPLE, y2 / _OVERSAMPLE, x2 / _OVERSAMPLE


@cache
def _letter(character: str, font: str) -> Image.Image:
    """One character cut to its ink, 96 pixels high (pixel font: its own few pixels): L."""
    face = ImageFont.load_default_imagefont() if font == "pixel" else ImageFont.load_default(120)
    canvas = Image.new("L", (260, 260))
    ImageDraw.Draw(canvas).text((60, 60), character, 255, font=face, stroke_width=5 if font == "bold" else 0)
    if font == "slanted":
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, 0.22, -30, 0, 1, 0), Image.Resampling.BILINEAR)
    canvas = canvas.crop(canvas.getbbox())
    return canvas if font == "pixel" else canvas.resize((max(1, canvas.width * 96 // canvas.height), 96))


def _glyph(character: str, font: str, height: int) -> Image.Image:
    letter = _letter(character, font)
    kind = Image.Resampling.NEAREST if font == "pixel" else Image.Resampling.BILINEAR
    return letter.resize((max(2, round(letter.width * height / letter.height)), height), kind)


def _points(array: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in array]


def _hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """Hue in degrees, saturation and value in 0..1 -> red, green, blue in 0..255."""
    s, v = min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    r, g, b = (v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)) * 255
    return int(r), int(g), int(b)
