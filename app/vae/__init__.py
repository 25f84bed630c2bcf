"""The networks, one file each; their architectures and families as rows; latent formats. Pure torch."""
