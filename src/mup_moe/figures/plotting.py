"""Matplotlib and seaborn with their own defaults, whatever a user has set: all that draws imports them from here.

Matplotlib reads its settings once, as it is first imported: from the environment, from the working folder and
from the home. A backend that is not installed, or a file that is not UTF-8, would end that import.
"""

import os
import sysconfig
from contextlib import chdir
from unittest.mock import patch

os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}

# A `matplotlibrc` in the working folder comes before all others; the standard library's folder has none.
with chdir(sysconfig.get_path("stdlib")):
    import matplotlib

    # A user's style sheets lie below that folder.
    with patch.object(matplotlib, "get_configdir", return_value=os.devnull):
        import matplotlib.style
        import seaborn as sns
        from matplotlib import pyplot
        from matplotlib.axes import Axes
        from matplotlib.axis import Axis
        from matplotlib.figure import Figure, SubFigure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch, Rectangle
        from matplotlib.text import Text
        from matplotlib.ticker import (
            EngFormatter,
            FixedLocator,
            FuncFormatter,
            LogLocator,
            MaxNLocator,
            NullFormatter,
            NullLocator,
            ScalarFormatter,
        )

__all__ = [
    "Axes",
    "Axis",
    "ConstrainedLayoutEngine",
    "EngFormatter",
    "Figure",
    "FixedLocator",
    "FuncFormatter",
    "Line2D",
    "LogLocator",
    "MaxNLocator",
    "NullFormatter",
    "NullLocator",
    "Patch",
    "Rectangle",
    "ScalarFormatter",
    "SubFigure",
    "Text",
    "matplotlib",
    "pyplot",
    "sns",
]
