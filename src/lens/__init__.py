"""The lens: HookedTransformer and what belongs to it, over unmodified models."""
