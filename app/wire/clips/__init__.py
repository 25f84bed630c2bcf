"""Clips: frames out of a body one by one, and into one as they come."""
