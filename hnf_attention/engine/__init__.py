"""What computes attention: the public calls, the operators, and the engines they choose from."""
