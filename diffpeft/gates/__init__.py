"""Hard-concrete gates: sampling, and the forward and backward passes through them."""
