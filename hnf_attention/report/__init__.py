"""Reports for a terminal: tables of layers, lists of issues, the check before training."""
