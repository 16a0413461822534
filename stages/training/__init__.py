"""What every training stage shares: seeds, devices, ranks, batches, optimiser, the loop, and how a run ends."""
