"""From recorded features to scores: estimators, thresholds, splits, figures and controls."""
