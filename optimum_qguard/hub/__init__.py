"""Carries results to the Hugging Face Hub: model cards, uploads, and a bot that scans what others upload."""
