"""The laboratory: small training runs that show whether the diagnosis is right and whether the fixes help.

Run its commands from the root of the checkout: `python -m bench.validation.predict --small`. See docs/validation.md.
"""
