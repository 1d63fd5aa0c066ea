"""Which sequence holds which page of the KV cache. No torch: numbers only, so that it can be fuzzed by the million.

A page holds `page_size` tokens. A full page of known tokens has a key, the digest of all tokens up to its end; a later
sequence that begins with the same tokens shares it. A page nobody holds is free; while it still has a key it is kept as
long as other free pages last, the longest unused given up first.

Every page is in exactly one place: held (references > 0), cached (free with a key) or blank (free without one).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

Key = bytes
ROOT: Key = b""


def page_key(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of a full page: of its tokens and of all pages before it."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(b"".join(t.to_bytes(4, "little") for t in tokens))
    return digest.digest()


def page_keys(tokens: Sequence[int], page_size: int) -> list[Key]:
    """The keys of all full pages of a sequence."""
    keys: list[Key] = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        keys.append(page_key(keys[-1] if keys else ROOT, tokens[start : start + page_size]))
    return keys


class PageTable:
    """The pages of one cache, alike on every rank of a replica because every rank makes the same calls."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.n_pages, self.page_size = n_pages, page_size
        self._references = [0] * n_pages
        self._key: list[Key | None] = [None] * n_pages
        self._page_of: dict[Key, int] = {}
        # Taken from the end: the lowest page first, so that a lone sequence lies in one piece.
        self._blank = list(range(n_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def n_free(self) -> int:
        """Pages that can be taken, those kept for their key included."""
        return len(self._blank) + len(self._cached)

    @property
    def n_held(self) -> int:
        return self.n_pages - self.n_free

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def take(self) -> int:
        """A page of one's own. The caller has seen that one is free."""
        if self._blank:
            page = self._blank.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            key = self._key[page]
            assert key is not None, f"page {page} is cached without a key"
            del self._page_of[key]
            self._key[page] = None
        self._references[page] = 1
        return page

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The pages that hold the longest run of `keys` from the start. They are not taken yet: `share` does that."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages that `match` found."""
        for page in pages:
            self._cached.pop(page, None)
            self._references[page] += 1

    def n_matched_free(self, pages: Sequence[int]) -> int:
        """How many of the pages that `match` found are free now and would be taken from the free ones."""
        return sum(self._references[page] == 0 for page in pages)

    def name(self, page: int, key: Key) -> None:
        """A held page is full and computed: let others find it. If another page has the key already, that one stays."""
        assert self._references[page] > 0, f"page {page} is named but nobody holds it"
        if key not in self._page_of and self._key[page] is None:
            self._page_of[key], self._key[page] = page, key

    def forget(self, pages: Sequence[int]) -> None:
        """What these held pages hold must not be found again."""
        for page in pages:
            key, self._key[page] = self._key[page], None
            if key is not None:
                del self._page_of[key]

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages, the last first, so that of a sequence's pages its beginning is kept longest."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} was released more often than held"
            if self._references[page] == 0:
                if self._key[page] is None:
                    self._blank.append(page)
                else:
                    self._cached[page] = None

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Verify that the table and the sequences holding pages agree; the error shows the sum that does not add up."""
        count = [0] * self.n_pages
        for pages in held:
            assert len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}"
            for page in pages:
                count[page] += 1
        assert count == self._references, f"held {count}, references {self._references}"
        n_held = sum(c > 0 for c in count)
        total = n_held + len(self._blank) + len(self._cached)
        assert total == self.n_pages, (
            f"{n_held} held + {len(self._blank)} blank + {len(self._cached)} cached = {total}, not {self.n_pages}"
        )
        assert all(self._key[p] is None for p in self._blank), "a blank page has a key"
        named = {p: k for p, k in enumerate(self._key) if k is not None}
        assert {k: p for p, k in named.items()} == self._page_of, "keys and pages point at different things"
