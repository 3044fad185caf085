"""What a posterior predicts, and what the prediction is worth: draws, calibration, scores."""
