"""The models folder -> checkpoints: noticing what changes, identity, names. Knows no file format, no device policy."""
