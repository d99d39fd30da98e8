"""Fitting: rates checked against a learner's groups, and plans run, previewed and resumed."""

from .fine_tune import fine_tune as fine_tune
from .fine_tune import fine_tune_plan as fine_tune_plan
from .learner_rates import lrs as lrs
from .preview import Preview as Preview
from .preview import preview as preview
from .record import RunRecord as RunRecord
from .record import StageRecord as StageRecord
from .run import fit_plan as fit_plan
from .shared import caches_shared as caches_shared
from .sweep import Sweep as Sweep
from .sweep import lr_find as lr_find
