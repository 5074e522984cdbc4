"""LASR: a learned word whose vectors differ by cross-attention layer and follow that layer's features and the time."""
