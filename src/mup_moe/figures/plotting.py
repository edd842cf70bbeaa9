"""Matplotlib and seaborn with their own defaults, whatever a user has set; all drawing code imports them from here.

Matplotlib reads its settings once, when it is first imported: from the environment, the working folder and the home
folder. A backend that is not installed, or a file that is not UTF-8, would make that import fail.
"""

import os
import sysconfig
from contextlib import chdir
from unittest.mock import patch

os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}

# A `matplotlibrc` in the working folder comes before all others; the standard library's folder has none.
with chdir(sysconfig.get_path("stdlib")):
    import matplotlib as matplotlib

    # A user's style sheets are below that folder.
    with patch.object(matplotlib, "get_configdir", return_value=os.devnull):
        import matplotlib.style
        import seaborn
        from matplotlib import pyplot as pyplot
        from matplotlib.axes import Axes as Axes
        from matplotlib.axis import Axis as Axis
        from matplotlib.figure import Figure as Figure
        from matplotlib.figure import SubFigure as SubFigure
        from matplotlib.layout_engine import ConstrainedLayoutEngine as ConstrainedLayoutEngine
        from matplotlib.lines import Line2D as Line2D
        from matplotlib.patches import Patch as Patch
        from matplotlib.patches import Rectangle as Rectangle
        from matplotlib.text import Text as Text
        from matplotlib.ticker import EngFormatter as EngFormatter
        from matplotlib.ticker import FixedLocator as FixedLocator
        from matplotlib.ticker import FuncFormatter as FuncFormatter
        from matplotlib.ticker import LogLocator as LogLocator
        from matplotlib.ticker import MaxNLocator as MaxNLocator
        from matplotlib.ticker import NullFormatter as NullFormatter
        from matplotlib.ticker import NullLocator as NullLocator
        from matplotlib.ticker import ScalarFormatter as ScalarFormatter

sns = seaborn
