"""How each result is shown, by its name; what is not here has every column as it is.

``NAME/VIEW`` is another way to show the result called ``NAME``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tables.attacks import defence_summary, defence_table, outliers_table
from tables.encrypt import collapse_table, compressor_table, undo_table
from tables.guard import load_table, quality_table
from tables.markdown import Rows
from tables.precision import (
    allocation_table,
    cyclic_table,
    nested_memory_table,
    nested_quality_table,
    nested_speed_table,
    precision_table,
)
from tables.repair import attacks_table, repair_table, step_table
from tables.scan import accuracy_table

TABLES: Mapping[str, Callable[[Rows], str]] = {
    "repair_table": repair_table,
    "repair_attacks": attacks_table,
    "repair_step": step_table,
    "scan_accuracy": accuracy_table,
    "outliers": outliers_table,
    "collapse_matrix": collapse_table,
    "undo": undo_table,
    "llm_compressor": compressor_table,
    "guard_load": load_table,
    "guard_quality": quality_table,
    "defence_table": defence_table,
    "defence_table/summary": defence_summary,
    "precision_table": precision_table,
    "nested_quality": nested_quality_table,
    "nested_speed": nested_speed_table,
    "nested_memory": nested_memory_table,
    "allocation": allocation_table,
    "cyclic_training": cyclic_table,
}
