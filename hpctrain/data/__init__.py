"""Data on disk: shards that are safe to open and quick to read, the order of samples, the blocks of a rank."""
