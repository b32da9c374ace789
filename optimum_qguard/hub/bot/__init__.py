"""A bot that scans models when they change on the Hub, and says there what it found.

A webhook (`payload`, `server`) puts the commit into a queue on disk (`queue`); workers (`worker`) take it from there,
let a process of its own scan it (`scanner`), and post the report (`message`, `poster`). `page` is for scanning by
hand, `metrics` is what monitoring sees.
"""
