"""Names from files on terminals and in pictures."""

import io

import numpy as np
import pytest
from rich.console import Console

from d2zero.cli.terminal import plain
from d2zero_runtime import D2ZeroError, Detections
from d2zero_runtime.draw import LARGEST_SIDE
from d2zero_runtime.errors import printable
from d2zero_runtime.fonts import font_for
from d2zero_runtime.masks import rle


@pytest.mark.parametrize("name", ["[/red]", "[bold]", "\x1b[2Jcat", "a\nb", "\u202egnp"])
def test_names_are_neither_markup_nor_commands(name: str) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=80).print(plain(name))
    shown = out.getvalue()
    assert "\x1b[2J" not in shown and (name in shown or "\ufffd" in shown)
    assert printable("кошка 猫") == "кошка 猫"


@pytest.mark.parametrize("name", ["café Ü", "γάτα", "кошка"])
def test_labels_have_latin_greek_and_cyrillic_letters(name: str) -> None:
    font, text = font_for(name, 16)
    absent = bytes(font.getmask("\uffff"))
    assert text == name and all(bytes(font.getmask(letter)) != absent for letter in name if letter != " ")


def test_letters_that_no_font_has_are_written_as_numbers() -> None:
    _, text = font_for("cat \U0001099c", 16)
    assert text == r"cat \U0001099c"
    with pytest.raises(D2ZeroError, match="is not a font"):
        font_for("cat", 16, given="absent.ttf")


def test_a_long_strip_is_not_enlarged_beyond_a_limit() -> None:
    mask = np.zeros((20, 6000), bool)
    mask[5:10, 5:4000] = True
    found = Detections(
        boxes=np.array([[5, 5, 4000, 10]], np.float32), scores=np.ones(1, np.float32), class_ids=np.zeros(1, np.int64),
        names=("cat",), seen=np.ones(1, bool), masks=(rle.encode(mask),), image_size=(20, 6000),
    )  # fmt: skip
    assert max(found.plot(np.zeros((20, 6000, 3), np.uint8)).size) <= LARGEST_SIDE
