"""Several processes, parts of a batch, and parameters in shards."""
