"""The warp-specialised forward for Hopper, in Gluon."""
