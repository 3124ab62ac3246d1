"""Training: the Prompt Predictor, the detector, and the ground truth that they learn from."""
