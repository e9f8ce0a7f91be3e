"""Watching a model: when to measure, how to record, what to report."""
