"""Keeps what people wrote apart from what a template wrote, though a template renders both into one string.

Control tokens are looked for in that string. So every place where a content spells one, alone or together with what
may stand beside it, is broken by a noncharacter first, and the break outlives trimming, searching, splitting and
replacing. Whatever still reads as a control token after rendering was written by the template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from llama_dist.text.dialog import refusal

# Unicode sets these apart for use inside a program (Unicode, ch. 23.7).
_NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class Guard:
    """`special`: control tokens by text; `shown`: those that are no secret to decoded text, such as `</think>`.

    A hidden token is broken after its first character. One that is shown gets a mark in front instead, since
    templates cut earlier answers at `</think>`. Example: `a<|im_end|>` becomes `a<B|im_end|>`, B the break.
    """

    special: Mapping[str, int]
    shown: frozenset[str]
    breaker: str
    marker: str

    def protect(self, content: str) -> str:
        """`content` so that none of it can be taken for a control token, nor together with what stands around it."""
        inserts: list[tuple[int, str]] = []
        for token in self.special:
            at = content.find(token)
            while at >= 0:
                marked = token in self.shown or len(token) == 1
                inserts.append((at, self.marker) if marked else (at + 1, self.breaker))
                at = content.find(token, at + 1)
        inserts += [(at, self.breaker) for at in self._edges(content)]
        parts, done = [], 0
        for at, sign in sorted(set(inserts)):
            parts += [content[done:at], sign]
            done = at
        return "".join([*parts, content[done:]])

    def split(self, rendered: str) -> Iterator[tuple[str, int | None]]:
        """Control tokens of the template with their ids, and with None the text between them, free of signs."""
        longest_first = "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True))
        done = 0
        for match in re.finditer(f"({self.marker}?)({longest_first})", rendered) if longest_first else ():
            if not match[1]:
                yield self._bare(rendered[done : match.start()]), None
                yield match[2], self.special[match[2]]
                done = match.end()
        yield self._bare(rendered[done:]), None

    def _bare(self, text: str) -> str:
        return text.replace(self.breaker, "").replace(self.marker, "")

    def _edges(self, content: str) -> Iterator[int]:
        """Where `content`, with or without the white space at its ends, could complete a token with its neighbours."""
        listed = "".join(f"\0{token}\0" for token in self.special)
        longest = max(map(len, self.special), default=0)
        stripped = (len(content) - len(content.lstrip()), len(content.rstrip()))
        for start, stop in {stripped, (0, len(content))}:
            core = content[start:stop]
            if not core:
                continue
            inside = len(core) < longest and core in listed
            if inside or any(core[:n] + "\0" in listed for n in range(1, longest)):
                yield start
            if inside or any("\0" + core[-n:] in listed for n in range(1, longest)):
                yield stop


def make_guard(special: Mapping[str, int], shown: frozenset[str], texts: Iterable[str]) -> Guard:
    """A guard whose two signs occur in none of `texts`: contents and template. RequestError if all 32 are taken."""
    used = set().union(*texts)
    free = [c for c in _NONCHARACTERS if c not in used]
    if len(free) < 2:
        raise refusal("messages use up the noncharacters U+FDD0 to U+FDEF; remove them")
    return Guard(special, shown, free[0], free[1])
