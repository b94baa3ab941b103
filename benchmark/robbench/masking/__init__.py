"""Gradient masking: can a robust accuracy be trusted?"""
