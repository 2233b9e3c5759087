"""Everything of a Lattice layer between its input and its output projection, as one operation."""

from lattice_serve.kernels.mixer.layout import StateLayout
from lattice_serve.kernels.mixer.reference import MixerState, mix
from lattice_serve.kernels.mixer.segments import Segments
from lattice_serve.kernels.mixer.shape import MixerShape, MixerWeights

__all__ = ["MixerShape", "MixerState", "MixerWeights", "Segments", "StateLayout", "mix"]
