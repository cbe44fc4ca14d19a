"""The trainers' losses: the coefficient that each sampled token carries; one file per family."""

from entropy_probe.losses.base import Loss, build_loss, loss_types

__all__ = ["Loss", "build_loss", "loss_types"]
