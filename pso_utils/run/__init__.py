"""What the training scripts share around their loops: flags, set-up, optimizer steps, checkpoints, logs, validation,
model card. Beside the scripts, this is the only place that sees the flags (`args`)."""
