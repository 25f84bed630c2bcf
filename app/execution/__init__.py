"""How a network runs: the primitive that networks are written against, whole, and exactly over bands of rows."""
