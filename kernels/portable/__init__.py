"""Forward, probe and backward in portable Triton."""
