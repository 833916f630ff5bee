"""What the scripts share: texts (formats), torchrun (processes), run folders (runs), models and losses."""
