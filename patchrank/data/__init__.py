"""From shards to batches: reading, decoding, joining images with their rankings, and writing shards."""
