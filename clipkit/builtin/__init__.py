"""The model that ships inside: an OpenCLIP checkpoint, and how it was made (see MODEL_CARD.md)."""
