"""Generate: the synthetic corpus, hybrid-sampled from a model. Imports `recovery` only."""
