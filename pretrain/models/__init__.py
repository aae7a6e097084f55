"""Models: a `transformers` causal LM from the configuration, its loss, and arithmetic about it. No ranks here."""
