"""Fine-tuning the towers on captioned pictures."""
