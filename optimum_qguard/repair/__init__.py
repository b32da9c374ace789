"""Repairs damaged models: a short fine-tune whose weights are held near a clean checkpoint's."""
