"""Draw all figures of the lessons: `.venv/bin/python -m workbook.figures`.

Each goes to a file of its own in `notebooks/figures/`.
"""

from workbook import draw_cloud, draw_cluster, draw_details, draw_faults, draw_steps, draw_system
from workbook.lesson import ROOT

FOLDER = ROOT / "notebooks/figures"
# The SVG of each figure, by its name.
FIGURES = {
    **{name: draw_system.system(*lesson) for name, lesson in draw_system.LESSONS.items()},
    **{name: draw_steps.steps(column) for name, column in draw_steps.STEPS.items()},
    "05-localhost": draw_steps.localhost(),
    "cluster": draw_cluster.cluster(),
    "images": draw_details.images(),
    "service": draw_details.service(),
    "headless": draw_details.headless(),
    "ending": draw_details.ending(),
    "12": draw_details.homework(),
    "faults-tree": draw_faults.tree(),
    "faults-path": draw_faults.path(),
    "admitted": draw_cloud.admitted(),
    "teardown": draw_cloud.teardown(),
}

if __name__ == "__main__":
    for name, figure in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(figure)
