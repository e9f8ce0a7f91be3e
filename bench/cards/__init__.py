"""What `bench/two_cards.py` runs in each process: one part a file."""
