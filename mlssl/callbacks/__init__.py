"""What happens beside the training: probing, watching, picturing, exporting. None of it touches the training itself."""

from mlssl.callbacks.collapse import CollapseMonitor as CollapseMonitor
from mlssl.callbacks.export import BackboneExport as BackboneExport
from mlssl.callbacks.knn import OnlineKNN as OnlineKNN
from mlssl.callbacks.learning_rate import LearningRate as LearningRate
from mlssl.callbacks.probe import OnlineLinearProbe as OnlineLinearProbe
from mlssl.callbacks.representation import RepresentationLogger as RepresentationLogger
from mlssl.callbacks.throughput import Throughput as Throughput
from mlssl.callbacks.view_grid import ViewGridLogger as ViewGridLogger
