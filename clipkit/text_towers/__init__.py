"""Text towers without torch, for a search that starts at once."""

from clipkit.text_towers.bert import TextTower, open_text_tower

__all__ = ["TextTower", "open_text_tower"]
