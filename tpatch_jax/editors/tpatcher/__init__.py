"""T-Patcher: neurons in the last layer and at subjects."""
