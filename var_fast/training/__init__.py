"""Training of the tokenizer and of the transformer: data, loops, checkpoints, export."""
