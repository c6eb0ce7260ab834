"""Every figure, as a picture: as it looked when a person last looked at it, and with room for all its texts.

The pictures in `baseline` are drawn by the versions in constraints.txt. After a change that is meant, draw them again,
look at each, and commit them:

    python -m pytest tests/analysis/test_figure_images.py --mpl-generate-path=tests/analysis/baseline
"""

import pytest
from figure_cases import KINDS, check_texts, draw, labelled_layers
from matplotlib.axis import XAxis

from msplora_analysis.show.drawing.venues import style_of

# Of figures that do not show layers one by one, their number changes nothing.
CASES = [
    ("figure3", 12, None),
    ("figure3", 12, "acl-column"),
    ("figure4", 12, None),
    ("figure4", 32, "icml"),
    ("figure4", 80, None),
    ("figure4", 80, "acl-column"),
    ("kl_between_layers", 12, None),
    ("kl_between_layers", 32, "acl-column"),
    ("kl_between_layers", 80, "neurips"),
    ("m_eff_over_epochs", 12, "acl-column"),
    ("effective_rank_over_epochs", 12, "neurips"),
    ("effective_rank_map", 12, None),
    ("effective_rank_map", 32, "acl-column"),
    ("effective_rank_map", 80, None),
    ("spectra_by_layer", 12, None),
    ("spectra_by_layer", 32, "acl-column"),
    ("spectra_by_layer", 80, None),
    ("rank_needed", 12, None),
    ("rank_needed", 32, "acl-column"),
    ("rank_needed", 80, "neurips"),
    ("overlap_between_layers", 12, None),
    ("overlap_between_layers", 32, "acl-column"),
    ("overlap_between_layers", 80, "icml"),
    ("decoupling_over_epochs", 12, None),
    ("what_carries", 12, None),
    ("what_carries", 32, "acl-column"),
    ("what_carries", 80, None),
    ("metric_against_rank", 12, None),
    ("metric_against_rank", 12, "acl-column"),
    ("predicted_against_measured", 12, None),
    ("predicted_against_measured", 12, "neurips"),
    ("relations", 12, None),
    ("relations", 32, "acl-column"),
    ("comparison", 12, None),
    ("comparison", 12, "acl-column"),
]


def test_every_kind_of_figure_is_among_the_cases():
    assert {kind for kind, _, _ in CASES} == set(KINDS)


NAMES = ["-".join(str(part) for part in case if part) for case in CASES]


# Many layers take long to draw.
MARKED = [pytest.param(*case, marks=[pytest.mark.slow] if case[1] >= 32 else []) for case in CASES]


@pytest.mark.parametrize(("kind", "layers", "style"), MARKED, ids=NAMES)
@pytest.mark.mpl_image_compare(style="default", savefig_kwargs={"dpi": 60}, tolerance=2)
def test_figure(kind, layers, style):
    figure = draw(kind, layers, style)
    check_texts(figure)
    look = style_of(style)
    width = figure.get_figwidth()
    assert width in look.widths
    assert figure.get_figheight() <= 9.5
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_label_text().startswith("layer"):
                step = labelled_layers(axis, layers)
                box = ax.get_window_extent()
                pitch = (box.width if isinstance(axis, XAxis) else box.height) / layers * 72 / figure.dpi
                assert step == 1 or step / 2 * pitch < 6.5
    figure.set_layout_engine("none")
    return figure
