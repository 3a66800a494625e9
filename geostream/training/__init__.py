"""Train one model on one or several GPUs: network, loss, augmentation, optimizer step, epoch, checkpoints."""
