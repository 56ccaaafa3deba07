"""What a rank holds: modules in stages, shares of states, gradients and their sums."""
