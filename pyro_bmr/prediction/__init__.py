"""What a posterior predicts, and what the prediction is worth: draws, calibration, scores."""

from pyro_bmr.prediction.calibration import best_temperature, best_widening, temperature_scaled
from pyro_bmr.prediction.of_outputs import predict_networks
from pyro_bmr.prediction.paired_losses import PairedLoss, paired_loss
from pyro_bmr.prediction.predictive import (
    ChunkedPrediction,
    ClassPrediction,
    MixturePrediction,
    RealPrediction,
)

__all__ = [
    "ChunkedPrediction",
    "ClassPrediction",
    "MixturePrediction",
    "PairedLoss",
    "RealPrediction",
    "best_temperature",
    "best_widening",
    "paired_loss",
    "predict_networks",
    "temperature_scaled",
]
