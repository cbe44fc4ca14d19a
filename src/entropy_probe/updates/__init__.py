"""From rollouts to a parameter change: streaming gradients, the optimizer step and its parts."""
