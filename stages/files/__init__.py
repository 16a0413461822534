"""What is on disk: dataset rows, manifests, checkpoints, run logs."""
