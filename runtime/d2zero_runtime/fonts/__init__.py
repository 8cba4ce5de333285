r"""The font of labels: DejaVu Sans with Latin, Greek and Cyrillic letters (licence beside it), or one with more.

Letters that no font at hand has are written as their numbers, such as `\\u732b`, not as boxes.
"""

from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from d2zero_runtime.errors import D2ZeroError

OWN = Path(__file__).parent / "DejaVuSans.ttf"
# Names of fonts with more letters, which Pillow looks for where the system keeps fonts.
COMMON = (
    "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc", "msyh.ttc",
    "PingFang.ttc", "Arial Unicode.ttf", "arialuni.ttf", "NotoSansArabic-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "DejaVuSans.ttf",
)  # fmt: skip
_ABSENT = "\uffff"  # no letter: a font draws for it what it draws for letters that it lacks
Font = ImageFont.FreeTypeFont


def font_for(text: str, size: int, given: str | None = None) -> tuple[Font, str]:
    """A font, and the text with letters that the font has.

    Args:
        text: What will be drawn.
        size: The height of letters in pixels.
        given: A font file, preferred to all others.

    Raises:
        D2ZeroError: `given` is no font.
    """
    paths = [*([given] if given else []), str(OWN), *(COMMON if not _has(str(OWN), text) else ())]
    if given:
        _opened(given, size)
    chosen = next((path for path in paths if _has(path, text)), given or str(OWN))
    numbers = {letter: letter.encode("ascii", "backslashreplace").decode() for letter in set(text)}
    return _opened(chosen, size), "".join(letter if _has(chosen, letter) else numbers[letter] for letter in text)


@lru_cache(maxsize=32)
def _opened(path: str, size: int) -> Font:
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise D2ZeroError(f"{path} is not a font that can be opened ({error})") from error


@lru_cache(maxsize=4096)
def _has(path: str, text: str) -> bool:
    """Whether a font can be opened and has all letters of a text."""
    try:
        font = _opened(path, 16)
    except D2ZeroError:
        return False
    absent = bytes(font.getmask(_ABSENT))
    return all(letter.isspace() or bytes(font.getmask(letter)) != absent for letter in set(text))
