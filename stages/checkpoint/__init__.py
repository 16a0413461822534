"""What a run leaves on disk: atomic writes, the output folder, resume state, manifest, digests."""
