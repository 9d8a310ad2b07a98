"""Named colours (sRGB, 0..1). The names are the words that captions use."""

from __future__ import annotations


def _rgb(text: str) -> tuple[float, float, float]:
    return (int(text[0:2], 16) / 255, int(text[2:4], 16) / 255, int(text[4:6], 16) / 255)


SKIN = {  # from pale to deep
    "pale": _rgb("efcdb8"),
    "fair": _rgb("e9bd9f"),
    "light": _rgb("dfab86"),
    "olive": _rgb("d4a076"),
    "tan": _rgb("bd8255"),
    "brown": _rgb("945d3b"),
    "dark brown": _rgb("6f432c"),
    "deep": _rgb("50301f"),
}
HAIR = {
    "black": _rgb("221e22"),
    "dark brown": _rgb("40291c"),
    "brown": _rgb("6b4428"),
    "blond": _rgb("ddb86a"),
    "red": _rgb("a8431c"),
    "gray": _rgb("9c9a9a"),
    "white": _rgb("e6e4e0"),
    "pink": _rgb("e0709f"),
    "blue": _rgb("3d6fc4"),
}
IRIS = {
    "brown": _rgb("6a4023"),
    "dark": _rgb("3b2417"),
    "blue": _rgb("4f8fc9"),
    "green": _rgb("5d8f55"),
    "gray": _rgb("83909a"),
    "hazel": _rgb("94703a"),
}
CLOTH = {
    "red": _rgb("c0322f"),
    "orange": _rgb("e5802b"),
    "yellow": _rgb("efc53f"),
    "green": _rgb("3f8a4e"),
    "teal": _rgb("2a8c8c"),
    "blue": _rgb("2f62b5"),
    "navy": _rgb("22304f"),
    "purple": _rgb("70479e"),
    "pink": _rgb("e58aab"),
    "white": _rgb("eeeeea"),
    "gray": _rgb("85898f"),
    "black": _rgb("26262a"),
    "brown": _rgb("79513a"),
}
BACKDROP = {
    "red": _rgb("c65a50"),
    "orange": _rgb("ecab67"),
    "yellow": _rgb("f1d988"),
    "green": _rgb("87b98b"),
    "teal": _rgb("66b0ae"),
    "blue": _rgb("86b3e0"),
    "purple": _rgb("a48fcb"),
    "pink": _rgb("f0bccb"),
    "white": _rgb("efefec"),
    "gray": _rgb("b3b7bc"),
    "dark": _rgb("33363e"),
}
FRAME = {
    "black": _rgb("1d1d20"),
    "brown": _rgb("6d4426"),
    "gold": _rgb("c9a24a"),
    "red": _rgb("b8292f"),
    "blue": _rgb("2c57b0"),
    "white": _rgb("efefef"),
}
LIPSTICK = {
    "red": _rgb("bb1f2e"),
    "pink": _rgb("e0608d"),
    "plum": _rgb("7c2450"),
    "coral": _rgb("e8694f"),
}
MASK = {
    "blue": _rgb("9cc8e4"),
    "white": _rgb("f0f1f2"),
    "black": _rgb("2b2c30"),
    "pink": _rgb("eeb6c6"),
}
