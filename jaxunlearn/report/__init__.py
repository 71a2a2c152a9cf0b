"""Reports: one dict of numbers in, JSON, Markdown, a page with figures and a terminal table out.

The package knows the report's schema and nothing of how its numbers came about: it imports no other
part of the library. ``example_report`` shows the schema.
"""

from jaxunlearn.report.alignment import alignment_by_layer, alignment_by_rank, alignment_curve
from jaxunlearn.report.coefficients import coefficient_maps
from jaxunlearn.report.confusion import confusion_pair
from jaxunlearn.report.contour import loss_contour_panels
from jaxunlearn.report.costs import runtime_bars
from jaxunlearn.report.curves import forgetting_curve
from jaxunlearn.report.embedding import embedding_panels
from jaxunlearn.report.example import example_arrays, example_report
from jaxunlearn.report.features import feature_rows, features_table
from jaxunlearn.report.figures import (
    class_accuracy_bars,
    layer_change_bars,
    pseudo_label_bars,
    subspace_bars,
)
from jaxunlearn.report.files import write_report
from jaxunlearn.report.gallery import report_figures
from jaxunlearn.report.grids import alpha_heat_map
from jaxunlearn.report.html import render_html
from jaxunlearn.report.markdown import render_markdown
from jaxunlearn.report.relearning import relearning_curves, relearning_rows
from jaxunlearn.report.saliency import saliency_panels
from jaxunlearn.report.spectra import angle_lines, spectrum_panels
from jaxunlearn.report.tables import console_table, summary_rows
from jaxunlearn.report.vector import vector_class_bars, vector_image

__all__ = [
    "alignment_by_layer",
    "alignment_by_rank",
    "alignment_curve",
    "alpha_heat_map",
    "angle_lines",
    "class_accuracy_bars",
    "coefficient_maps",
    "confusion_pair",
    "console_table",
    "embedding_panels",
    "example_arrays",
    "example_report",
    "feature_rows",
    "features_table",
    "forgetting_curve",
    "layer_change_bars",
    "loss_contour_panels",
    "pseudo_label_bars",
    "relearning_curves",
    "relearning_rows",
    "render_html",
    "render_markdown",
    "report_figures",
    "runtime_bars",
    "saliency_panels",
    "spectrum_panels",
    "subspace_bars",
    "summary_rows",
    "vector_class_bars",
    "vector_image",
    "write_report",
]
