"""The specification: attention, masks, samples and the fold in plain PyTorch."""
