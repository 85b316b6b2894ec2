"""Preview LR schedules without training: parse an expression, build the scheduler, compute the learning rates."""
