"""How the built-in model is made and measured; see clipkit/builtin/MODEL_CARD.md."""
