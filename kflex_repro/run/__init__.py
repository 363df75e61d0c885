"""Runs the KFlex artifact that ``build --artifact`` built, where the kernel can."""
