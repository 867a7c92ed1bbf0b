"""Takes the names of sub-packages out of code, so that a label cannot be read off the text.

A function of `matrices` says `Matrix`, `is_matrix`, `matrices.dense`, `MatrixBase`: a classifier would learn to spell.
Every form of a sub-package's name (singular, plural, any case) becomes the one word `name`, whichever function it
stands in. Forms of five letters and more are replaced wherever they stand, also inside words (`eigenvectors` ->
`eigenname`); shorter ones (`set`, `core`, `poly`, `stat`) only where they are a whole part of an identifier, as in
`FiniteSet` or `is_set`, or `offset` and `score` would be cut to pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NEUTRAL = "name"
_LONG = 5
_LETTERS = re.compile(r"[A-Za-z]+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""Parts of snake_case and CamelCase identifiers: `FiniteSet` -> Finite, Set."""


def forms(word: str) -> set[str]:
    """A name with its singular and plural: matrices, matrix, matrice; geometry, geometries, geometrys."""
    found = {word}
    if word.endswith("s"):
        found.add(word[:-1])
    else:
        found.add(word + "s")
    for ending, other in (("ies", "y"), ("ices", "ix"), ("y", "ies")):
        if word.endswith(ending):
            found.add(word.removesuffix(ending) + other)
    return found


class Neutraliser:
    """Replaces every form of the given names; call it with a text.

    It works on runs of letters and remembers each one's replacement: a corpus has a million runs but few different
    ones (searching the text for all forms at once took 6 s, this takes under 1 s).
    """

    def __init__(self, names: Iterable[str]) -> None:
        words = {form for name in names for form in forms(name)}
        self.long = frozenset(word for word in words if len(word) >= _LONG)
        self.short = frozenset(words - self.long)
        longest_first = sorted(self.long, key=lambda word: (-len(word), word))
        self._long = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.IGNORECASE)
        self._known: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        return _LETTERS.sub(self._replace, text)

    def _replace(self, run: re.Match[str]) -> str:
        word = run[0]
        known = self._known.get(word)
        if known is None:
            known = self._long.sub(NEUTRAL, word)
            known = _PART.sub(lambda part: NEUTRAL if part[0].lower() in self.short else part[0], known)
            self._known[word] = known
        return known

    def left_in(self, text: str) -> set[str]:
        """Forms that a text still holds: empty for every text that went through."""
        lower = text.lower()
        parts = {part.lower() for part in _PART.findall(text)}
        return {word for word in self.long if word in lower} | (parts & self.short)
