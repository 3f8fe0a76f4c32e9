"""Tables in, float32 rows and class names out."""

from mdml_fast.data.batches import write_table
from mdml_fast.data.digits import digits_table
from mdml_fast.data.encoding import FeatureEncoder
from mdml_fast.data.labelled import LabelledTable, label_table
from mdml_fast.data.tables import as_table, read_table

__all__ = ["FeatureEncoder", "LabelledTable", "as_table", "digits_table", "label_table", "read_table", "write_table"]
