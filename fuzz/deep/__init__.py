"""The weekly deep run: a campaign of many shards, resumable, with a map of what was covered."""
