"""HTTP only: bytes in, bytes out, and the one table that turns errors into statuses."""
