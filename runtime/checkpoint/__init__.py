"""Files to weights: where a checkpoint is found and how each layout is read."""
