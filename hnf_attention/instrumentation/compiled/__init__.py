"""What measuring inside a graph of `torch.compile` needs."""
