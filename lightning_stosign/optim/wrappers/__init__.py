"""Optimizers made of other optimizers."""
