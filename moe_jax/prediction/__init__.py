"""Prediction of the experts that the next layers will need: predictors, activation log, fitting, metrics."""
