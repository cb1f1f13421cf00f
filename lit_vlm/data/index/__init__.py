"""Sample index: cost of each record, read once and cached in shards, with the length policy and image verification."""
