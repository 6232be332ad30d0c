"""The lab: checkpoints, training, weights, runs and the journal. It imports no other room."""
