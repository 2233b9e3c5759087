"""The Lattice family (arXiv 2504.05646): its configuration and its network."""
