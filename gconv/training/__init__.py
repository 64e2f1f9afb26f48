"""Training: data sets, augmentation, recipes, the training loop and evaluation."""
