"""What every record costs: read once, kept in shards that are never stale, shortened by the length policy, verified."""
