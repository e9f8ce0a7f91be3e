"""A run as a page for a browser: the verdict, the issues with their stories, every head over time."""

from .build import Page, html

__all__ = ["Page", "html"]
