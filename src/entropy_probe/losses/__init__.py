"""The trainers' losses: the coefficient that each sampled token carries; one file per family of trainers."""

from entropy_probe.losses.base import Loss, Settings, build_loss, default_loss, trainers

__all__ = ["Loss", "Settings", "build_loss", "default_loss", "trainers"]
