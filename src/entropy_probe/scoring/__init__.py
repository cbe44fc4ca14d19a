"""From token ids to log-probabilities and entropies, at whatever parameters the model holds."""
