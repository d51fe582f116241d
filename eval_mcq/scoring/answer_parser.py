"""Parsing of a written reply: strict and anchored, never a guess.

A letter counts only as an explicit answer ("B", "B. cataract", "The answer is (B)"); a disease name only if it is the
whole reply or the end of its sentence ("The image shows cataract.") and equals one option exactly. Everything else is
unparsed: "The answer is cataract" is never C.
"""

import re
from collections.abc import Sequence

from eval_mcq.items.schema import LETTERS

PARSER_VERSION = "parser-1"
"""Recorded in every run of mode ``generate``; incremented whenever the parsing changes."""

_MARKS = re.compile(r"[*_`\"“”]+|</?\w+>")
_END = r"(?=\s*(?:$|[.,;:)\]!\n]|\b(?:because|since|as|due)\b))"
_ALONE = re.compile(r"^\W*([A-Za-z])\W*$")
_FIRST = re.compile(r"^\s*[(\[]?([A-Z])(?:[)\]]\s*[.:]?|[.:])(?=\s|$)")
_SAID = re.compile(
    r"\b(?i:answer|option|choice|select|choose)(?i:\s+(?:option|choice))?(?i:\s*(?:is|would be|must be|:|=))*"
    r"(?i:\s*(?:option|choice|letter))?\s*[(\[]?(?<![A-Za-z])([A-Z])(?![\w'’])[)\]]?" + _END
)
_LISTED = re.compile(r"^\s*(?:,|/|&|\band\b|\bor\b)\s*[(\[]?[A-Z](?![\w'’])")
_LEAD = re.compile(
    r"^.*(?:\b(?:is|are|shows?|with|suggests?|indicates?|depicts?|demonstrates?|of)\b|:)\s*",
    re.IGNORECASE | re.DOTALL,
)
_NEGATION = re.compile(
    r"\b(?:not|no|without|neither|nor|never|or|rather|than|instead|unlikely|except|cannot|but)\b|n['’]t\b",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+", re.I)


def parse_reply(reply: str, options: Sequence[str]) -> int | None:
    """Return the position of the option that a reply names.

    Args:
        reply: The model's reply.
        options: Option texts in the order in which they were shown.

    Returns:
        The position, or None if the reply names no option, several, or none clearly.
    """
    text = _MARKS.sub("", reply).strip()
    names = [_plain(option) for option in options]
    if (named := _exact(text, names)) is not None:
        return named
    offered = LETTERS[: len(options)]
    if alone := _ALONE.match(text):
        place = LETTERS.index(alone[1].upper())
        return place if place < len(options) else None
    said = [*_FIRST.finditer(text), *_SAID.finditer(text)]
    if said:
        last = max(said, key=lambda match: match.start(1))
        return _checked(last, text, names) if last[1] in offered else None
    return _at_the_end(text, names)


def _checked(match: re.Match[str], text: str, names: Sequence[str]) -> int | None:
    """Return a letter's position, unless another letter, another option's name or the rest of a name follows."""
    after = text[match.end() :]
    if _LISTED.match(after):
        return None
    place = LETTERS.index(match[1])
    line = re.split(r"\n", after.lstrip(" .:)]-,"), maxsplit=1)[0]
    follows = [i for i, name in enumerate(names) if re.match(rf"{re.escape(name)}(?!\w)", _plain(line))]
    if follows:
        return place if place in follows else None
    return None if match.re is _FIRST and line[:1].islower() else place


def _at_the_end(text: str, names: Sequence[str]) -> int | None:
    """Return the option whose name ends a one-sentence reply, unless it is negated or another option is named."""
    body = text.rstrip(" .!")
    lead = _LEAD.match(body)
    if lead is None or re.search(r"[.!?;\n]\s", body):
        return None
    before = _plain(lead[0])
    others = any(re.search(rf"\b{re.escape(name)}\b", before) for name in names)
    return None if others or _NEGATION.search(before) else _exact(body[lead.end() :], names)


def _exact(text: str, names: Sequence[str]) -> int | None:
    plain = _plain(text)
    for candidate in (plain, _ARTICLE.sub("", plain)):
        if candidate and names.count(candidate) == 1:
            return names.index(candidate)
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,:;!")
