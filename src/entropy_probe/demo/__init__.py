"""A tiny policy and its training run: a checkpoint to probe within minutes, without a network."""
