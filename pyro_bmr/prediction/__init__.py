"""What a posterior predicts, and what the prediction is worth: draws, calibration, scores."""

from pyro_bmr.prediction.calibration import best_temperature, best_widening
from pyro_bmr.prediction.paired_losses import PairedLoss, paired_loss

__all__ = ["PairedLoss", "best_temperature", "best_widening", "paired_loss"]
