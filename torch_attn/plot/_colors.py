"""The two styles' colours, for the figures and the HTML page alike.

The colour maps run in equal steps of lightness (CIE L*), so that equal differences of weight look equal, in colour, in
grey, and to people who see colours differently. Both start near their style's background: what is not attended recedes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    is_dark: bool
    background: str
    panel: str  # buttons of the HTML page
    ink: str  # titles and labels
    muted: str  # ticks, notes and frames
    grid: str
    mark: str  # the one thing that must stand out from every colour of the map
    ramp: tuple[str, ...]  # the colour map, from 0 to the largest weight


LIGHT = Style(
    is_dark=False,
    background="#ffffff",
    panel="#f5f7fa",
    ink="#1b1f27",
    muted="#5b6370",
    grid="#d5dae1",
    mark="#d9481c",
    ramp=(
        "#f6fafb",
        "#cbe8f1",
        "#a0d4e8",
        "#77bfdf",
        "#58a9da",
        "#4391d5",
        "#3a77cf",
        "#395fb8",
        "#36499f",
        "#32367e",
        "#292654",
    ),
)

DARK = Style(
    is_dark=True,
    background="#10131a",
    panel="#191d26",
    ink="#e9ecf2",
    muted="#9aa3b2",
    grid="#343b48",
    mark="#ff7a4d",
    ramp=(
        "#161a23",
        "#202a48",
        "#2b3b70",
        "#354d9a",
        "#2b68af",
        "#1882c1",
        "#029fc3",
        "#0fbbbd",
        "#5ed5b0",
        "#b7e4a7",
        "#f7f4bd",
    ),
)

STYLES = {"light": LIGHT, "dark": DARK}
