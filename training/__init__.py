"""Entry scripts for `accelerate launch` and the little they need: trigger tokens, label masks."""
