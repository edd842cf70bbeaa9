# What figures and compositions are about, and what drawing them takes.
import json

from mup_moe.analysis.published import check_reference, read_published
from mup_moe.analysis.request import figure_request
from mup_moe.files import expand_home

# The report's headings in the paper's order; Snakemake sorts them by name.
FIGURE_CATEGORIES = {
    "width": "2 Learning-rate transfer over widths",
    "experts": "3 Experts and granularity",
    "granularity": "3 Experts and granularity",
    "dense": "4 Dense models",
}


def kind_of(figure):
    """What a figure, or the first one of a composition, is about: a key of FIGURE_CATEGORIES."""
    settings = CONFIG.figures[CONFIG.compositions.get(figure, [figure])[0]]
    dense = settings.axes.architecture == ("dense",)
    return "dense" if dense else settings.curve


def find_reference(figure):
    """A figure's published losses, as seen from here or else from the workflow's own folder."""
    try:
        path = expand_home(CONFIG.figures[figure].reference)
        if not path.exists():
            path = Path(os.path.relpath(Path(workflow.basedir) / path))
        literal([path])
        check_reference(
            CONFIG.figures[figure], read_published(path, CONFIG.analysis.loss), path
        )
    except UserError as error:
        raise WorkflowError(
            f"config.yaml: `figures.{figure}.reference`: {error}"
        ) from None
    return str(path)


# Found and read before anything runs.
REFERENCES = {
    name: find_reference(name)
    for name, figure in CONFIG.figures.items()
    if figure.reference is not None
}


def drawing_request(figure):
    """A figure's request with what only its drawing depends on."""
    return figure_request(CONFIG, figure) | {"reference": REFERENCES.get(figure)}


def references_of(*figures):
    """What drawing these figures reads, and the tables of differences that are made along with it."""
    with_reference = [figure for figure in figures if figure in REFERENCES]
    tables = expand("results/{figure}/reference.csv", figure=with_reference)
    return [REFERENCES[figure] for figure in with_reference] + tables


def parts_of(wildcards):
    """The figures of a composition."""
    return CONFIG.compositions[wildcards.composition]
