"""What the stages are made of, one thought a file; whoever copies a stage takes these with it."""
