"""Reports: `html` for a browser; tables of layers, lists of issues and the check before training for a terminal."""

from .page import Page, html

__all__ = ["Page", "html"]
