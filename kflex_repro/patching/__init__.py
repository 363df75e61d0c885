"""Recipes over a user's source tree: where to change it, all or nothing, and exactly back."""
