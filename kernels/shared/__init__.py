"""What the kernels share: the running softmax, masks, tiles and launches."""
