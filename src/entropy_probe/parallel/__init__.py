"""Several processes, the rows of a batch that each has, and parameters in shards."""
