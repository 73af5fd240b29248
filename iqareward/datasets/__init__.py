"""Score data sets: batches of columns anywhere, and whole data sets on Ray Data.

`samples.py` decodes and scores, `columns.py` finds samples in batches of columns, `shards.py` finds and reads the
pieces of a data set, and `job.py` scores them on a Ray cluster, which needs the extra `data`.
"""

from iqareward.datasets.columns import ScoreColumns as ScoreColumns
from iqareward.datasets.job import DatasetReport as DatasetReport
from iqareward.datasets.job import score_dataset as score_dataset
