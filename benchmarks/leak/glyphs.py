"""Glyphs of the fonts that matplotlib ships: a character is an identity, a font a view of it.

DejaVu and STIX draw the same character in up to sixteen styles. Characters that look alike across
alphabets (Latin, Greek and Cyrillic A) are one identity: only the first is kept.
"""

import dataclasses
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

#: Pixels a side.
SIDE = 16
#: Views of every identity.
VIEWS = 8
_SCALE = 4
#: Greatest cosine of two identities' mean pictures, both less the mean of all.
ALIKE = 0.9
_FONTS = (
    *("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Bold"),
    *("DejaVuSansMono-Bold", "DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneral"),
    *("DejaVuSansMono-Oblique", "STIXGeneralBol", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif-BoldItalic", "STIXGeneralItalic", "DejaVuSansMono-BoldOblique"),
)
#: Classes, by the first word of a character's name; everything else is a symbol.
CLASSES = ("LATIN", "CYRILLIC", "GREEK", "GEORGIAN", "ARMENIAN", "symbol")
#: Not pictures of anything: patterns of dots and lines, marks above and below.
_LEFT_OUT = ("BRAILLE", "BOX", "MODIFIER", "QUADRANT", "COMBINING")


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Identities in a random order that never changes.

    Attributes:
      images: [identity, view, side, side], -1 to 1, white on black.
      classes: [identity], number in `CLASSES`.
      characters: one for each identity.
    """

    images: np.ndarray
    classes: np.ndarray
    characters: str

    def __len__(self) -> int:
        """Number of identities."""
        return len(self.images)

    def __getitem__(self, part: slice) -> "Glyphs":
        """Some of the identities."""
        return Glyphs(self.images[part], self.classes[part], self.characters[part])


@cache
def glyphs() -> Glyphs:
    """All identities."""
    import matplotlib
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    held = {name: TTFont(folder / f"{name}.ttf").getBestCmap() or {} for name in _FONTS}
    drawn = {
        name: ImageFont.truetype(str(folder / f"{name}.ttf"), int(0.9 * SIDE * _SCALE))
        for name in _FONTS
    }
    codes, images = [], []
    for code in sorted(set().union(*held.values())):
        fonts = [name for name in _FONTS if code in held[name]][:VIEWS]
        if len(fonts) == VIEWS and _is_picture(chr(code)):
            views = [_draw(drawn[name], chr(code)) for name in fonts]
            if all(view is not None for view in views):
                codes.append(code)
                images.append(views)
    pictures = np.asarray(images, np.float32)
    kept = _distinct(pictures)
    kept = kept[np.random.default_rng(0).permutation(len(kept))]
    characters = "".join(chr(codes[i]) for i in kept)
    classes = np.array([_class_of(c) for c in characters])
    return Glyphs(pictures[kept], classes, characters)


def versions() -> str:
    """Where the pictures come from, in words."""
    import matplotlib

    return f"DejaVu and STIX fonts of matplotlib {matplotlib.__version__}"


def _is_picture(character: str) -> bool:
    name = unicodedata.name(character, "")
    kind = unicodedata.category(character)[0]
    composed = unicodedata.decomposition(character)
    return kind in "LNSP" and not composed and name.split(" ")[0] not in ("", *_LEFT_OUT)


def _class_of(character: str) -> int:
    first = unicodedata.name(character).split()[0]
    return CLASSES.index(first) if first in CLASSES else len(CLASSES) - 1


def _draw(font, character: str) -> np.ndarray | None:
    """The glyph in the middle of the picture; None if it is empty or too large."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    wide, high, full = right - left, bottom - top, SIDE * _SCALE
    if not 0 < wide <= full or not 0 < high <= full:
        return None
    canvas = Image.new("L", (full, full))
    place = ((full - wide) // 2 - left, (full - high) // 2 - top)
    ImageDraw.Draw(canvas).text(place, character, font=font, fill=255)
    small = np.asarray(canvas, np.float32).reshape(SIDE, _SCALE, SIDE, _SCALE).mean(axis=(1, 3))
    return small / 127.5 - 1


def _distinct(pictures: np.ndarray) -> np.ndarray:
    """Numbers of identities that look like no earlier one."""
    means = pictures.mean(axis=1).reshape(len(pictures), -1)
    means = means - means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    alike, kept = np.matmul(means, means.T) > ALIKE, []
    for i in range(len(means)):
        if not alike[i, kept].any():
            kept.append(i)
    return np.array(kept)
