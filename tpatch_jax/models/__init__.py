"""Networks, checkpoints and the table of model families."""
