"""clipkit: find pictures by words, teach the towers your captions, and measure both."""

__version__ = "0.1.0"
