"""What the optimizers of all stages have in common: which parameters decay, the norm of a stage's gradients."""
