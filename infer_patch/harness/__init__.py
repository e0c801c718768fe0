"""Adapters for the evaluation harnesses people already use: lm-eval and lmms-eval."""
