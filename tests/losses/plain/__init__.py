"""The trainers' losses as scalars of log-probabilities and entropies, written plainly, for autograd."""
