"""What `bench/end_to_end.py` trains, and what it compares."""
