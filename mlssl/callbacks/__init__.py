"""Callbacks that probe, monitor, plot and export. Only `FiniteSteps` touches the training itself."""

from mlssl.callbacks.batch_norm import BatchNormStatistics as BatchNormStatistics
from mlssl.callbacks.collapse import CollapseMonitor as CollapseMonitor
from mlssl.callbacks.export import BackboneExport as BackboneExport
from mlssl.callbacks.finite import FiniteLoss as FiniteLoss
from mlssl.callbacks.finite import FiniteSteps as FiniteSteps
from mlssl.callbacks.groups import CompareWithinGroups as CompareWithinGroups
from mlssl.callbacks.knn import OnlineKNN as OnlineKNN
from mlssl.callbacks.learning_rate import LearningRate as LearningRate
from mlssl.callbacks.probe import OnlineLinearProbe as OnlineLinearProbe
from mlssl.callbacks.random_state import RandomState as RandomState
from mlssl.callbacks.record import RunRecord as RunRecord
from mlssl.callbacks.representation import RepresentationLogger as RepresentationLogger
from mlssl.callbacks.run_bar import RunBar as RunBar
from mlssl.callbacks.run_time import RunTime as RunTime
from mlssl.callbacks.small_maps import SmallMaps as SmallMaps
from mlssl.callbacks.step_memory import StepMemory as StepMemory
from mlssl.callbacks.step_summary import StepSummary as StepSummary
from mlssl.callbacks.throughput import Throughput as Throughput
from mlssl.callbacks.view_grid import ViewGridLogger as ViewGridLogger
from mlssl.callbacks.view_size import ViewSize as ViewSize
