"""The networks, their latent formats and families, and the ways to execute a network. Pure torch."""
