"""Make and measure the built-in model; see clipkit/builtin/MODEL_CARD.md."""
