"""Training: model, loss, augmentation, evaluation, embedding, checkpoints and the loop around them."""
