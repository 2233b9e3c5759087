"""How a Lattice model is made: tokenizer, data, optimizers, the training loop, the curves."""
