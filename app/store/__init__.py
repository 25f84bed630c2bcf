"""Files on disk -> checkpoints: formats, key names, identification, loading, hot reload. Knows no device policy."""
