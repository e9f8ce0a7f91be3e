"""The parts of a report's page, and its packed numbers."""

import base64
import zlib
from html.parser import HTMLParser

import numpy as np

from hnf_attention.report.page import packing


class Parts(HTMLParser):
    """The scripts of a page by id, and the names of all its elements."""

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.scripts, self.tags, self._open = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = dict(attributes).get("id", "own") if tag in ("script", "style") else None
        if tag == "style":
            self._open = "style"

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data


def unpacked(text, steps):
    """Codes (steps, heads) of a packed plane."""
    moved = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(-1, steps)
    return np.cumsum(moved, axis=1, dtype=np.uint8).T


def numbers(codes, scale):
    part = codes / packing.LAST
    found = (
        scale.low * (scale.high / scale.low) ** part
        if scale.log
        else scale.low + (scale.high - scale.low) * part
    )
    return np.where(codes == packing.NO_NUMBER, np.nan, np.where(codes == packing.INFINITE, np.inf, found))
