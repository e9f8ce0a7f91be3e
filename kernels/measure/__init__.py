"""Kernels that fold row statistics and scan masks."""
