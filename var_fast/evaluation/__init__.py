"""Numbers that say how good images are: of a tokenizer's reconstructions and of samples, and the samples they need."""
